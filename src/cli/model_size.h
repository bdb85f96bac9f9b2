// Sizes that follow from a model file: of its weights in memory, and of its keys and values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/codec.h"
#include "dense/activations.h"
#include "gguf/gguf_file.h"
#include "gguf/hyperparameters.h"

namespace jointkv::cli {

struct MatrixSize {
  int64_t elements = 0;
  size_t file_bytes = 0;
  size_t packed_bytes = 0;  // as panels of `precision`
};

// The matrices that each row of a step is multiplied with: all but a token embedding that is not also the output.
MatrixSize MatricesOf(const gguf::GgufFile& file, dense::Precision precision);
// The output matrix alone, of which a prompt needs but one row's product.
int64_t OutputElements(const gguf::Hyperparameters& hp);

// K and V of one token in all layers, and of a sequence of so many tokens with what sliding-window layers give back.
size_t KvTokenBytes(const gguf::Hyperparameters& hp, codec::Codec codec);
size_t KvSequenceBytes(const gguf::Hyperparameters& hp, codec::Codec codec, int64_t tokens);

// Multiply-adds times two of attention for one query that sees `context` tokens, in all layers.
double AttentionFlops(const gguf::Hyperparameters& hp, double context);

}  // namespace jointkv::cli
