// The GGUF model file: metadata and tensor views over a read-only memory map, checked before anything else sees them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "ggml.h"

namespace jointkv::gguf {

// What a file may claim. Each bound is far above real models and low enough that a hostile header cannot make the
// reader allocate or loop for long.
struct Limits {
  uint64_t kv_pairs_max = 4096;              // real files hold fewer than 100
  uint64_t tensors_max = 65536;              // about 30 a layer for a mixture of experts; 65,536 is 2,000 such layers
  uint64_t key_bytes_max = 65535;            // the GGUF specification's own limit
  uint64_t tensor_name_bytes_max = 63;       // GGML_MAX_NAME less its terminator
  uint64_t string_bytes_max = 16u << 20;     // the longest real strings are chat templates, about 20 kB
  uint64_t array_elements_max = 16u << 20;   // merges of the largest vocabularies: about 500,000
  uint64_t metadata_bytes_max = 1u << 30;    // header, metadata and tensor infos together
  uint64_t alignment_bytes_min = 8;          // so that tensors can be read as floats in place
  uint64_t alignment_bytes_max = 1u << 20;   // 32 in practice; far past a page
  int64_t dimension_max = int64_t{1} << 31;  // rows and columns are counted with 32 bits further up
  int64_t elements_max = int64_t{1} << 44;   // keeps every byte count of a tensor below 2^47
};

// A named matrix inside the map. Valid as long as its GgufFile.
struct Tensor {
  std::string name;
  ggml_type type = GGML_TYPE_F32;
  int n_dims = 0;
  std::array<int64_t, 4> ne = {1, 1, 1, 1};  // ne[0] is the contiguous (input) dimension; unused ones are 1
  const std::byte* data = nullptr;
  size_t size_bytes = 0;

  int64_t rows() const { return ne[1] * ne[2] * ne[3]; }
  int64_t elements() const { return ne[0] * rows(); }
};

// A GGUF v2 or v3 file, memory-mapped read-only. Threads: const after Open, so any thread may read.
// Owns: the map; Tensor::data points into it and stays valid when the GgufFile is moved.
// Fails how: kNotFound (no such path), kIo (not a readable regular file), kInvalidArgument (not GGUF, malformed),
// kOutOfRange (past Limits), kDataLoss (truncated, or contradicts itself), kUnsupported (big-endian, split, version,
// tensor type). A file that another process truncates while it is mapped ends this process (SIGBUS).
class GgufFile {
 public:
  static Expected<GgufFile> Open(const std::string& path, const Limits& limits = {});

  GgufFile(GgufFile&& other) noexcept;
  GgufFile& operator=(GgufFile&& other) noexcept;
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;
  ~GgufFile();

  const std::vector<Tensor>& tensors() const { return tensors_; }  // in file order
  const Tensor* Find(std::string_view name) const;                 // nullptr when there is none

  bool Has(std::string_view key) const { return entries_.find(key) != entries_.end(); }
  // kNotFound when the key is missing, kInvalidArgument (with the type found) when it holds something else.
  Expected<uint32_t> GetU32(std::string_view key) const;  // any integer type whose value fits
  Expected<float> GetF32(std::string_view key) const;     // f32 or f64
  Expected<bool> GetBool(std::string_view key) const;
  Expected<std::string> GetString(std::string_view key) const;
  Expected<std::vector<int32_t>> GetI32Array(std::string_view key) const;   // any integer type whose values fit
  Expected<std::vector<uint32_t>> GetU32Array(std::string_view key) const;  // any integer type whose values fit
  Expected<std::vector<float>> GetF32Array(std::string_view key) const;     // f32 or f64
  Expected<std::vector<bool>> GetBoolArray(std::string_view key) const;
  Expected<size_t> StringArraySize(std::string_view key) const;  // string arrays are validated, never copied
  bool IsArray(std::string_view key) const;

  // The fallback only when the key is missing; a wrong type stays an error.
  Expected<uint32_t> GetU32Or(std::string_view key, uint32_t fallback) const;
  Expected<float> GetF32Or(std::string_view key, float fallback) const;
  Expected<bool> GetBoolOr(std::string_view key, bool fallback) const;
  Expected<std::string> GetStringOr(std::string_view key, std::string fallback) const;

  const std::string& path() const { return path_; }
  const std::string& architecture() const { return architecture_; }  // general.architecture
  const std::string& quantization() const { return quantization_; }  // the type that holds the most bytes: "q4_1"
  size_t file_bytes() const { return map_bytes_; }
  uint32_t version() const { return version_; }

 private:
  friend class GgufParser;

  // A metadata value where it lies in the map.
  struct Entry {
    uint32_t type = 0;  // of the value, or of the array's elements
    bool is_array = false;
    uint64_t count = 1;         // array elements
    uint64_t offset_bytes = 0;  // of the first element; of the length word for strings
  };

  GgufFile() = default;
  Expected<const Entry*> Lookup(std::string_view key, bool want_array, std::string_view wanted) const;
  template <typename T>
  Expected<T> ReadInteger(std::string_view key, const Entry& entry, uint64_t index) const;
  template <typename T>
  Expected<std::vector<T>> ReadIntegerArray(std::string_view key, std::string_view wanted) const;
  Status WrongType(std::string_view key, const Entry& entry, std::string_view wanted) const;
  void Unmap();

  std::string path_;
  std::string architecture_;
  std::string quantization_;
  const std::byte* map_ = nullptr;
  size_t map_bytes_ = 0;
  uint32_t version_ = 0;
  std::map<std::string, Entry, std::less<>> entries_;
  std::vector<Tensor> tensors_;
  std::map<std::string, size_t, std::less<>> tensor_index_;
};

}  // namespace jointkv::gguf
