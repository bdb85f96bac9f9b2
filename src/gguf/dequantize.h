// From a tensor's stored type to float, through ggml's own conversion.
#pragma once

#include <cstdint>

#include "base/status.h"
#include "gguf/gguf_file.h"

namespace jointkv::gguf {

// Writes rows [row_begin, row_begin + rows) of the tensor to out (rows * ne[0] floats); a row is ne[0] contiguous
// elements, counted over all outer dimensions. Safe from several threads. Fails with kOutOfRange when the rows are not
// in the tensor, kUnsupported when ggml has no conversion for the type.
Status Dequantize(const Tensor& tensor, int64_t row_begin, int64_t rows, float* out);

}  // namespace jointkv::gguf
