// A made-up matrix in any type of ggml's, for the tests of dense/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "dense/test_matrices.h"
#include "ggml.h"
#include "gguf/dequantize.h"

namespace jointkv::dense {

// A tensor over its own memory, as a file would hold it, and the floats that it stands for.
struct Weight {
  Weight(ggml_type type, int in, int out, uint64_t seed) {
    const std::vector<float> source = RandomFloats(static_cast<size_t>(in) * out, seed);
    bytes.resize(ggml_row_size(type, in) * out);
    const std::vector<float> importance(static_cast<size_t>(in), 1);  // which types below 3 bits insist on
    ggml_quantize_chunk(type, source.data(), bytes.data(), 0, out, in, importance.data());
    tensor.name = std::string("w.") + ggml_type_name(type);
    tensor.type = type;
    tensor.n_dims = 2;
    tensor.ne = {in, out, 1, 1};
    tensor.data = bytes.data();
    tensor.size_bytes = bytes.size();
    values.resize(source.size());
    EXPECT_TRUE(gguf::Dequantize(tensor, 0, out, values.data()).ok());
  }
  Weight(const Weight&) = delete;

  std::vector<std::byte> bytes;
  gguf::Tensor tensor;
  std::vector<float> values;  // (out, in)
};

}  // namespace jointkv::dense
