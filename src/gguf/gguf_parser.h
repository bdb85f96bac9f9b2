// Reads the header, metadata and tensor infos of a mapped GGUF file into a GgufFile. Private to this room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "base/status.h"
#include "gguf/gguf_file.h"

namespace jointkv::gguf {

// The value types of the format, with its numbers.
enum class ValueType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

// "u32"; "unknown type 77" for numbers outside the enum.
std::string ValueTypeName(uint32_t type);
// Of one element; 0 for strings, arrays and unknown types.
size_t ValueTypeBytes(uint32_t type);
// For messages: quoted, unprintable bytes escaped, at most 80 bytes shown.
std::string Quoted(std::string_view text);

// One pass over the map with a cursor that never passes its end. Threads: one. Owns: nothing; fills the GgufFile given.
// Fails how: as GgufFile says; the messages carry the byte position.
class GgufParser {
 public:
  GgufParser(GgufFile& file, const Limits& limits) : file_(file), limits_(limits) {}
  Status Parse();

 private:
  Status ParseHeader();
  Status ParseEntry(uint64_t index);
  Status SkipValue(std::string_view key, GgufFile::Entry& entry);
  Status ParseTensorInfo(uint64_t index);
  Status ParseTensorShape(Tensor& tensor);
  Status CheckTensorType(Tensor& tensor, int32_t type);
  Status ReadAlignment();
  Status PlaceTensors();
  Status CheckOverlaps() const;
  Status ReadSummary();

  // The next `bytes` exist and lie within the metadata limit.
  Status Need(uint64_t bytes, std::string_view what) const;
  template <typename T>
  Status Read(std::string_view what, T& out) {
    RETURN_IF_ERROR(Need(sizeof(T), what));
    std::memcpy(&out, file_.map_ + position_, sizeof(T));
    position_ += sizeof(T);
    return Status::Ok();
  }
  // A length-prefixed string; `out` points into the map.
  Status ReadString(std::string_view what, uint64_t bytes_max, std::string_view& out);
  Status Fail(StatusCode code, std::string_view message) const;

  GgufFile& file_;
  const Limits& limits_;
  uint64_t position_ = 0;
  uint64_t n_tensors_ = 0;
  uint64_t n_entries_ = 0;
  uint64_t alignment_ = 32;
  std::vector<uint64_t> offsets_;  // of each tensor, from the start of the data section
};

}  // namespace jointkv::gguf
