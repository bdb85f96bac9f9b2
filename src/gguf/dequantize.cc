#include "gguf/dequantize.h"

#include <cstring>
#include <string>

namespace jointkv::gguf {

Status Dequantize(const Tensor& tensor, int64_t row_begin, int64_t rows, float* out) {
  if (row_begin < 0 || rows < 0 || row_begin > tensor.rows() || rows > tensor.rows() - row_begin) {
    return {StatusCode::kOutOfRange, "gguf: tensor '" + tensor.name + "': " + std::to_string(rows) + " rows from row " +
                                         std::to_string(row_begin) + " are not within its " +
                                         std::to_string(tensor.rows()) + " rows"};
  }
  if (rows == 0) return Status::Ok();
  const auto row_bytes = tensor.size_bytes / static_cast<size_t>(tensor.rows());
  const std::byte* const source = tensor.data + static_cast<size_t>(row_begin) * row_bytes;
  if (tensor.type == GGML_TYPE_F32) {
    std::memcpy(out, source, static_cast<size_t>(rows) * row_bytes);
    return Status::Ok();
  }
  const ggml_to_float_t to_float = ggml_get_type_traits(tensor.type)->to_float;
  if (to_float == nullptr) {
    return {StatusCode::kUnsupported, "gguf: tensor '" + tensor.name + "' of type " + ggml_type_name(tensor.type) +
                                          " cannot be turned into floats"};
  }
  to_float(source, out, rows * tensor.ne[0]);
  return Status::Ok();
}

}  // namespace jointkv::gguf
