#include "gguf/gguf_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "gguf/gguf_parser.h"

namespace jointkv::gguf {

namespace {

struct Mapping {
  const std::byte* data = nullptr;
  size_t bytes = 0;
};

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

Status IoError(const std::string& path, const std::string& what, int error) {
  const StatusCode code = error == ENOENT || error == ENOTDIR ? StatusCode::kNotFound : StatusCode::kIo;
  return {code, "gguf: " + Quoted(path) + ": " + what + ": " + std::strerror(error)};
}

Expected<Mapping> MapFile(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    return Status(StatusCode::kInvalidArgument, "gguf: path " + Quoted(path) + " holds a zero byte");
  }
  // Non-blocking, so that a FIFO without a writer is seen by fstat instead of hanging the open.
  const FileDescriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) return IoError(path, "cannot open", errno);
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return IoError(path, "cannot stat", errno);
  if (S_ISDIR(info.st_mode))
    return Status(StatusCode::kIo, "gguf: " + Quoted(path) + ": is a directory, expected a file");
  if (!S_ISREG(info.st_mode)) return Status(StatusCode::kIo, "gguf: " + Quoted(path) + ": is not a regular file");
  if (info.st_size == 0) return Status(StatusCode::kDataLoss, "gguf: " + Quoted(path) + ": the file is empty");
  const auto bytes = static_cast<size_t>(info.st_size);
  void* const data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return IoError(path, "cannot map " + std::to_string(bytes) + " bytes", errno);
  return Mapping{static_cast<const std::byte*>(data), bytes};
}

bool IsInteger(uint32_t type) {
  switch (static_cast<ValueType>(type)) {
    case ValueType::kU8:
    case ValueType::kI8:
    case ValueType::kU16:
    case ValueType::kI16:
    case ValueType::kU32:
    case ValueType::kI32:
    case ValueType::kU64:
    case ValueType::kI64: return true;
    default: return false;
  }
}

bool IsFloat(uint32_t type) {
  return type == static_cast<uint32_t>(ValueType::kF32) || type == static_cast<uint32_t>(ValueType::kF64);
}

template <typename T>
T Load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

template <typename To, typename From>
Expected<To> Narrow(std::string_view key, From value) {
  if (std::in_range<To>(value)) return static_cast<To>(value);
  return Status(StatusCode::kOutOfRange, "gguf: key " + Quoted(key) + ": " + std::to_string(value) + " is not in [" +
                                             std::to_string(std::numeric_limits<To>::min()) + ", " +
                                             std::to_string(std::numeric_limits<To>::max()) + "]");
}

Expected<float> LoadFloat(std::string_view key, uint32_t type, const std::byte* at) {
  if (type == static_cast<uint32_t>(ValueType::kF32)) return Load<float>(at);
  const auto value = Load<double>(at);
  if (std::isfinite(value) && std::abs(value) > static_cast<double>(std::numeric_limits<float>::max())) {
    return Status(StatusCode::kOutOfRange,
                  "gguf: key " + Quoted(key) + ": " + std::to_string(value) + " does not fit a float");
  }
  return static_cast<float>(value);
}

}  // namespace

Expected<GgufFile> GgufFile::Open(const std::string& path, const Limits& limits) {
  try {
    ASSIGN_OR_RETURN(const Mapping mapping, MapFile(path));
    GgufFile file;
    file.map_ = mapping.data;
    file.map_bytes_ = mapping.bytes;
    file.path_ = path;
    RETURN_IF_ERROR(GgufParser(file, limits).Parse());
    return file;
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::kResourceExhausted, "gguf: no memory to read the metadata");
  }
}

GgufFile::GgufFile(GgufFile&& other) noexcept { *this = std::move(other); }

GgufFile& GgufFile::operator=(GgufFile&& other) noexcept {
  if (this == &other) return *this;
  Unmap();
  path_ = std::move(other.path_);
  architecture_ = std::move(other.architecture_);
  quantization_ = std::move(other.quantization_);
  map_ = std::exchange(other.map_, nullptr);
  map_bytes_ = std::exchange(other.map_bytes_, 0);
  version_ = other.version_;
  entries_ = std::move(other.entries_);
  tensors_ = std::move(other.tensors_);
  tensor_index_ = std::move(other.tensor_index_);
  return *this;
}

GgufFile::~GgufFile() { Unmap(); }

void GgufFile::Unmap() {
  if (map_ != nullptr) munmap(const_cast<std::byte*>(map_), map_bytes_);
  map_ = nullptr;
}

const Tensor* GgufFile::Find(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

bool GgufFile::IsArray(std::string_view key) const {
  const auto it = entries_.find(key);
  return it != entries_.end() && it->second.is_array;
}

Status GgufFile::WrongType(std::string_view key, const Entry& entry, std::string_view wanted) const {
  return {StatusCode::kInvalidArgument, "gguf: " + Quoted(path_) + ": key " + Quoted(key) + " is " +
                                            (entry.is_array ? "an array of " : "of type ") + ValueTypeName(entry.type) +
                                            ", expected " + std::string(wanted)};
}

Expected<const GgufFile::Entry*> GgufFile::Lookup(std::string_view key, bool want_array,
                                                  std::string_view wanted) const {
  const auto it = entries_.find(key);
  if (it == entries_.end()) {
    return Status(StatusCode::kNotFound,
                  "gguf: " + Quoted(path_) + ": key " + Quoted(key) + " (" + std::string(wanted) + ") is missing");
  }
  if (it->second.is_array != want_array) return WrongType(key, it->second, wanted);
  return &it->second;
}

template <typename T>
Expected<T> GgufFile::ReadInteger(std::string_view key, const Entry& entry, uint64_t index) const {
  const std::byte* at = map_ + entry.offset_bytes + index * ValueTypeBytes(entry.type);
  switch (static_cast<ValueType>(entry.type)) {
    case ValueType::kU8: return Narrow<T>(key, uint32_t{Load<uint8_t>(at)});
    case ValueType::kI8: return Narrow<T>(key, int32_t{Load<int8_t>(at)});
    case ValueType::kU16: return Narrow<T>(key, uint32_t{Load<uint16_t>(at)});
    case ValueType::kI16: return Narrow<T>(key, int32_t{Load<int16_t>(at)});
    case ValueType::kU32: return Narrow<T>(key, Load<uint32_t>(at));
    case ValueType::kI32: return Narrow<T>(key, Load<int32_t>(at));
    case ValueType::kU64: return Narrow<T>(key, Load<uint64_t>(at));
    case ValueType::kI64: return Narrow<T>(key, Load<int64_t>(at));
    default: return WrongType(key, entry, "an integer");
  }
}

template <typename T>
Expected<std::vector<T>> GgufFile::ReadIntegerArray(std::string_view key, std::string_view wanted) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, true, wanted));
  if (!IsInteger(entry->type)) return WrongType(key, *entry, wanted);
  std::vector<T> values(static_cast<size_t>(entry->count));
  for (size_t i = 0; i < values.size(); ++i) {
    ASSIGN_OR_RETURN(values[i], ReadInteger<T>(key, *entry, i));
  }
  return values;
}

Expected<uint32_t> GgufFile::GetU32(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, false, "an integer"));
  return ReadInteger<uint32_t>(key, *entry, 0);
}

Expected<float> GgufFile::GetF32(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, false, "f32"));
  if (!IsFloat(entry->type)) return WrongType(key, *entry, "f32");
  return LoadFloat(key, entry->type, map_ + entry->offset_bytes);
}

Expected<bool> GgufFile::GetBool(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, false, "bool"));
  if (entry->type != static_cast<uint32_t>(ValueType::kBool)) return WrongType(key, *entry, "bool");
  return map_[entry->offset_bytes] != std::byte{0};
}

Expected<std::string> GgufFile::GetString(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, false, "string"));
  if (entry->type != static_cast<uint32_t>(ValueType::kString)) return WrongType(key, *entry, "string");
  const std::byte* at = map_ + entry->offset_bytes;
  return std::string(reinterpret_cast<const char*>(at + sizeof(uint64_t)), static_cast<size_t>(Load<uint64_t>(at)));
}

Expected<std::vector<int32_t>> GgufFile::GetI32Array(std::string_view key) const {
  return ReadIntegerArray<int32_t>(key, "an array of i32");
}

Expected<std::vector<uint32_t>> GgufFile::GetU32Array(std::string_view key) const {
  return ReadIntegerArray<uint32_t>(key, "an array of u32");
}

Expected<std::vector<float>> GgufFile::GetF32Array(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, true, "an array of f32"));
  if (!IsFloat(entry->type)) return WrongType(key, *entry, "an array of f32");
  std::vector<float> values(static_cast<size_t>(entry->count));
  for (size_t i = 0; i < values.size(); ++i) {
    ASSIGN_OR_RETURN(values[i],
                     LoadFloat(key, entry->type, map_ + entry->offset_bytes + i * ValueTypeBytes(entry->type)));
  }
  return values;
}

Expected<std::vector<bool>> GgufFile::GetBoolArray(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, true, "an array of bool"));
  if (entry->type != static_cast<uint32_t>(ValueType::kBool)) return WrongType(key, *entry, "an array of bool");
  std::vector<bool> values(static_cast<size_t>(entry->count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = map_[entry->offset_bytes + i] != std::byte{0};
  return values;
}

Expected<size_t> GgufFile::StringArraySize(std::string_view key) const {
  ASSIGN_OR_RETURN(const Entry* entry, Lookup(key, true, "an array of string"));
  if (entry->type != static_cast<uint32_t>(ValueType::kString)) return WrongType(key, *entry, "an array of string");
  return static_cast<size_t>(entry->count);
}

Expected<uint32_t> GgufFile::GetU32Or(std::string_view key, uint32_t fallback) const {
  return Has(key) ? GetU32(key) : Expected<uint32_t>(fallback);
}

Expected<float> GgufFile::GetF32Or(std::string_view key, float fallback) const {
  return Has(key) ? GetF32(key) : Expected<float>(fallback);
}

Expected<bool> GgufFile::GetBoolOr(std::string_view key, bool fallback) const {
  return Has(key) ? GetBool(key) : Expected<bool>(fallback);
}

Expected<std::string> GgufFile::GetStringOr(std::string_view key, std::string fallback) const {
  return Has(key) ? GetString(key) : Expected<std::string>(std::move(fallback));
}

}  // namespace jointkv::gguf
