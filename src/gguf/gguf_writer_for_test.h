// Writes GGUF files, good and bad, for tests. Header only, so that tests of other rooms can use it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/checked.h"
#include "ggml.h"
#include "gguf/gguf_parser.h"

namespace jointkv::gguf {

// A file that lives as long as this object.
class TempFile {
 public:
  explicit TempFile(std::string_view bytes) {
    path_ = std::filesystem::temp_directory_path() / "gguf_test_XXXXXX";
    const int fd = mkstemp(path_.data());
    CHECK(fd >= 0);
    close(fd);
    std::ofstream out(path_, std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    CHECK(out.good());
  }
  ~TempFile() { unlink(path_.c_str()); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Collects metadata and tensors, then lays them out. Public fields override what a correct file would hold.
class GgufWriter {
 public:
  struct TensorSpec {
    std::string name;
    std::vector<int64_t> ne;
    int32_t type = GGML_TYPE_F32;
    std::string data;
    std::optional<uint32_t> n_dims;
    std::optional<uint64_t> offset;  // from the start of the data section
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  std::optional<uint64_t> n_tensors;
  std::optional<uint64_t> n_entries;
  uint64_t alignment = 32;  // of the layout only; add general.alignment yourself

  template <typename T>
  static std::string Raw(T value) {
    std::string bytes(sizeof(T), '\0');
    std::memcpy(bytes.data(), &value, sizeof(T));
    return bytes;
  }
  static std::string RawString(std::string_view text) { return Raw(uint64_t{text.size()}) + std::string(text); }

  // A later value for a key replaces the earlier one, unless it comes through AddDuplicate.
  GgufWriter& Add(const std::string& key, uint32_t type, std::string value) {
    for (auto& entry : entries_) {
      if (entry.first != key) continue;
      entry.second = Raw(type) + std::move(value);
      return *this;
    }
    return AddDuplicate(key, type, std::move(value));
  }
  GgufWriter& AddDuplicate(const std::string& key, uint32_t type, std::string value) {
    entries_.emplace_back(key, Raw(type) + std::move(value));
    return *this;
  }
  GgufWriter& Add(const std::string& key, ValueType type, std::string value) {
    return Add(key, static_cast<uint32_t>(type), std::move(value));
  }
  GgufWriter& AddU32(const std::string& key, uint32_t value) { return Add(key, ValueType::kU32, Raw(value)); }
  GgufWriter& AddF32(const std::string& key, float value) { return Add(key, ValueType::kF32, Raw(value)); }
  GgufWriter& AddBool(const std::string& key, bool value) { return Add(key, ValueType::kBool, Raw(uint8_t{value})); }
  GgufWriter& AddString(const std::string& key, std::string_view value) {
    return Add(key, ValueType::kString, RawString(value));
  }
  GgufWriter& AddArray(const std::string& key, ValueType type, uint64_t count, const std::string& elements) {
    return Add(key, ValueType::kArray, Raw(static_cast<uint32_t>(type)) + Raw(count) + elements);
  }
  template <typename T>
  GgufWriter& AddNumbers(const std::string& key, ValueType type, const std::vector<T>& values) {
    std::string elements;
    for (const T value : values) elements += Raw(value);
    return AddArray(key, type, values.size(), elements);
  }
  GgufWriter& AddStrings(const std::string& key, const std::vector<std::string>& values) {
    std::string elements;
    for (const std::string& value : values) elements += RawString(value);
    return AddArray(key, ValueType::kString, values.size(), elements);
  }
  GgufWriter& Remove(const std::string& key) {
    std::erase_if(entries_, [&](const auto& entry) { return entry.first == key; });
    return *this;
  }

  GgufWriter& AddTensor(TensorSpec tensor) {
    tensors_.push_back(std::move(tensor));
    return *this;
  }
  GgufWriter& AddTensorF32(const std::string& name, const std::vector<int64_t>& ne, const std::vector<float>& values) {
    return AddTensor({name,
                      ne,
                      GGML_TYPE_F32,
                      std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)),
                      {},
                      {}});
  }
  GgufWriter& AddTensorF32(const std::string& name, const std::vector<int64_t>& ne, float value) {
    int64_t elements = 1;
    for (const int64_t size : ne) elements *= size;
    return AddTensorF32(name, ne, std::vector<float>(static_cast<size_t>(elements), value));
  }

  // Everything before the data section, unpadded.
  std::string Header() const {
    std::string out =
        magic + Raw(version) + Raw(n_tensors.value_or(tensors_.size())) + Raw(n_entries.value_or(entries_.size()));
    for (const auto& [key, value] : entries_) out += RawString(key) + value;
    uint64_t offset = 0;
    for (const TensorSpec& tensor : tensors_) {
      out += RawString(tensor.name) + Raw(tensor.n_dims.value_or(static_cast<uint32_t>(tensor.ne.size())));
      for (const int64_t size : tensor.ne) out += Raw(size);
      out += Raw(tensor.type) + Raw(tensor.offset.value_or(offset));
      offset += RoundUp<uint64_t>(tensor.data.size(), alignment);
    }
    return out;
  }

  std::string Build() const {
    std::string out = Header();
    for (const TensorSpec& tensor : tensors_) {
      out.resize(RoundUp<uint64_t>(out.size(), alignment));
      out += tensor.data;
    }
    return out;
  }

 private:
  std::vector<std::pair<std::string, std::string>> entries_;  // key, then type and value as stored
  std::vector<TensorSpec> tensors_;
};

}  // namespace jointkv::gguf
