#include "cli/model_size.h"

#include <algorithm>

#include "base/checked.h"
#include "codec/layout.h"
#include "dense/linear.h"

namespace jointkv::cli {
namespace {

// K and V of `tokens` tokens in one layer, at the rate of the largest blocks.
size_t LayerBytes(const gguf::Hyperparameters& hp, codec::Codec codec, int64_t tokens) {
  const codec::BlockLayout layout{hp.n_kv_heads, hp.head_dim, codec};
  return 2 * layout.block_bytes(codec::kBlockTokensMax) * static_cast<size_t>(tokens) / codec::kBlockTokensMax;
}

}  // namespace

MatrixSize MatricesOf(const gguf::GgufFile& file, dense::Precision precision) {
  const bool tied = file.Find("output.weight") == nullptr;
  MatrixSize size;
  for (const gguf::Tensor& tensor : file.tensors()) {
    if (tensor.n_dims < 2 || (tensor.name == "token_embd.weight" && !tied)) continue;
    size.elements += tensor.elements();
    size.file_bytes += tensor.size_bytes;
    size.packed_bytes += static_cast<size_t>(CeilDiv<int64_t>(tensor.rows(), dense::kPanel)) *
                         dense::PanelBytes(precision, tensor.type, static_cast<int>(tensor.ne[0]));
  }
  return size;
}

int64_t OutputElements(const gguf::Hyperparameters& hp) { return int64_t{hp.d_model} * hp.n_vocab; }

size_t KvTokenBytes(const gguf::Hyperparameters& hp, codec::Codec codec) {
  return static_cast<size_t>(hp.n_layers) * LayerBytes(hp, codec, 1);
}

size_t KvSequenceBytes(const gguf::Hyperparameters& hp, codec::Codec codec, int64_t tokens) {
  size_t bytes = 0;
  for (const bool swa : hp.is_swa_layer) {
    const int64_t held = swa ? std::min<int64_t>(tokens, hp.sliding_window) : tokens;
    bytes += LayerBytes(hp, codec, held);
  }
  return bytes;
}

double AttentionFlops(const gguf::Hyperparameters& hp, double context) {
  double flops = 0;
  for (const bool swa : hp.is_swa_layer) {
    flops += 4.0 * hp.d_q() * (swa ? std::min<double>(context, hp.sliding_window) : context);
  }
  return flops;
}

}  // namespace jointkv::cli
