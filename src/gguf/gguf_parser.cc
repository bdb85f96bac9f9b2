#include "gguf/gguf_parser.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cctype>
#include <numeric>

#include "base/checked.h"

namespace jointkv::gguf {

static_assert(std::endian::native == std::endian::little, "GGUF files are read as little-endian memory");

namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr uint32_t kVersionMin = 2;  // version 1 has 32-bit counts and no writer left
constexpr uint32_t kVersionMax = 3;
constexpr uint32_t kUnknownTypeFirst = 13;
constexpr uint32_t kDimsMax = 4;

std::string Number(uint64_t value) { return std::to_string(value); }

std::string ShapeText(const Tensor& tensor) {
  std::string text = "[";
  for (int d = 0; d < tensor.n_dims; ++d)
    text += (d == 0 ? "" : ", ") + std::to_string(tensor.ne[static_cast<size_t>(d)]);
  return text + "]";
}

}  // namespace

std::string ValueTypeName(uint32_t type) {
  constexpr std::array<const char*, kUnknownTypeFirst> kNames = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                                                 "bool", "string", "array", "u64", "i64", "f64"};
  return type < kNames.size() ? kNames[type] : "unknown type " + std::to_string(type);
}

size_t ValueTypeBytes(uint32_t type) {
  constexpr std::array<size_t, kUnknownTypeFirst> kBytes = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < kBytes.size() ? kBytes[type] : 0;
}

std::string Quoted(std::string_view text) {
  constexpr size_t kShownMax = 80;
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kShownMax)) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isprint(byte) != 0) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return out + (text.size() > kShownMax ? "...'" : "'");
}

Status GgufParser::Fail(StatusCode code, std::string_view message) const {
  return {code, "gguf: " + Quoted(file_.path_) + ": " + std::string(message)};
}

Status GgufParser::Need(uint64_t bytes, std::string_view what) const {
  const uint64_t left = file_.map_bytes_ - position_;
  if (bytes > left) {
    return Fail(StatusCode::kDataLoss, "truncated at byte " + Number(position_) + ": " + std::string(what) + " needs " +
                                           Number(bytes) + " bytes, " + Number(left) + " left");
  }
  if (position_ + bytes > limits_.metadata_bytes_max) {
    return Fail(StatusCode::kOutOfRange, "metadata passes the limit of " + Number(limits_.metadata_bytes_max) +
                                             " bytes at " + std::string(what));
  }
  return Status::Ok();
}

Status GgufParser::ReadString(std::string_view what, uint64_t bytes_max, std::string_view& out) {
  uint64_t bytes = 0;
  RETURN_IF_ERROR(Read(what, bytes));
  if (bytes > bytes_max) {
    return Fail(StatusCode::kOutOfRange, std::string(what) + " at byte " + Number(position_ - sizeof(bytes)) + ": " +
                                             Number(bytes) + " bytes, limit " + Number(bytes_max));
  }
  RETURN_IF_ERROR(Need(bytes, what));
  out = {reinterpret_cast<const char*>(file_.map_ + position_), static_cast<size_t>(bytes)};
  position_ += bytes;
  return Status::Ok();
}

Status GgufParser::Parse() {
  RETURN_IF_ERROR(ParseHeader());
  for (uint64_t i = 0; i < n_entries_; ++i) RETURN_IF_ERROR(ParseEntry(i));
  RETURN_IF_ERROR(ReadSummary());
  RETURN_IF_ERROR(ReadAlignment());
  for (uint64_t i = 0; i < n_tensors_; ++i) RETURN_IF_ERROR(ParseTensorInfo(i));
  RETURN_IF_ERROR(PlaceTensors());
  return CheckOverlaps();
}

Status GgufParser::ParseHeader() {
  RETURN_IF_ERROR(Need(kMagic.size(), "magic"));
  const std::string_view magic(reinterpret_cast<const char*>(file_.map_), kMagic.size());
  if (magic != kMagic) {
    return Fail(StatusCode::kInvalidArgument, "not a GGUF file: starts with " + Quoted(magic) + ", expected 'GGUF'");
  }
  position_ = kMagic.size();
  RETURN_IF_ERROR(Read("version", file_.version_));
  if (file_.version_ != 0 && (file_.version_ & 0xffff) == 0) {
    return Fail(StatusCode::kUnsupported, "big-endian file (version word " + Number(file_.version_) + ")");
  }
  if (file_.version_ < kVersionMin || file_.version_ > kVersionMax) {
    return Fail(StatusCode::kUnsupported, "version " + Number(file_.version_) + ", supported are 2 and 3");
  }
  RETURN_IF_ERROR(Read("tensor count", n_tensors_));
  RETURN_IF_ERROR(Read("metadata count", n_entries_));
  if (n_tensors_ > limits_.tensors_max) {
    return Fail(StatusCode::kOutOfRange, Number(n_tensors_) + " tensors, limit " + Number(limits_.tensors_max));
  }
  if (n_entries_ > limits_.kv_pairs_max) {
    return Fail(StatusCode::kOutOfRange,
                Number(n_entries_) + " metadata entries, limit " + Number(limits_.kv_pairs_max));
  }
  return Status::Ok();
}

Status GgufParser::ParseEntry(uint64_t index) {
  std::string_view key;
  RETURN_IF_ERROR(ReadString("key of metadata entry " + Number(index), limits_.key_bytes_max, key));
  if (key.empty()) return Fail(StatusCode::kInvalidArgument, "metadata entry " + Number(index) + " has an empty key");
  if (key.find('\0') != std::string_view::npos) {
    return Fail(StatusCode::kInvalidArgument, "key " + Quoted(key) + " holds a zero byte");
  }
  GgufFile::Entry entry;
  RETURN_IF_ERROR(Read("type of key " + Quoted(key), entry.type));
  if (entry.type == static_cast<uint32_t>(ValueType::kArray)) {
    entry.is_array = true;
    RETURN_IF_ERROR(Read("element type of key " + Quoted(key), entry.type));
    RETURN_IF_ERROR(Read("element count of key " + Quoted(key), entry.count));
    if (entry.type == static_cast<uint32_t>(ValueType::kArray)) {
      return Fail(StatusCode::kUnsupported, "key " + Quoted(key) + " holds an array of arrays");
    }
    if (entry.count > limits_.array_elements_max) {
      return Fail(StatusCode::kOutOfRange, "key " + Quoted(key) + ": " + Number(entry.count) + " elements, limit " +
                                               Number(limits_.array_elements_max));
    }
  }
  if (entry.type >= kUnknownTypeFirst) {
    return Fail(StatusCode::kInvalidArgument, "key " + Quoted(key) + " has value type " + Number(entry.type) +
                                                  ", known are 0 to " + Number(kUnknownTypeFirst - 1));
  }
  RETURN_IF_ERROR(SkipValue(key, entry));
  if (!file_.entries_.emplace(std::string(key), entry).second) {
    return Fail(StatusCode::kInvalidArgument, "key " + Quoted(key) + " appears twice");
  }
  return Status::Ok();
}

Status GgufParser::SkipValue(std::string_view key, GgufFile::Entry& entry) {
  entry.offset_bytes = position_;
  const std::string what = "value of key " + Quoted(key);
  if (entry.type == static_cast<uint32_t>(ValueType::kString)) {
    for (uint64_t i = 0; i < entry.count; ++i) {
      std::string_view text;
      RETURN_IF_ERROR(ReadString(what, limits_.string_bytes_max, text));
    }
    return Status::Ok();
  }
  const std::optional<uint64_t> bytes = CheckedMul(entry.count, uint64_t{ValueTypeBytes(entry.type)});
  if (!bytes) return Fail(StatusCode::kOutOfRange, what + ": " + Number(entry.count) + " elements");
  RETURN_IF_ERROR(Need(*bytes, what));
  if (entry.type == static_cast<uint32_t>(ValueType::kBool)) {
    for (uint64_t i = 0; i < entry.count; ++i) {
      const auto byte = std::to_integer<uint32_t>(file_.map_[position_ + i]);
      if (byte > 1) {
        return Fail(StatusCode::kInvalidArgument, what + " at byte " + Number(position_ + i) + ": bool stored as " +
                                                      Number(byte) + ", expected 0 or 1");
      }
    }
  }
  position_ += *bytes;
  return Status::Ok();
}

Status GgufParser::ReadSummary() {
  ASSIGN_OR_RETURN(file_.architecture_, file_.GetString("general.architecture"));
  ASSIGN_OR_RETURN(const uint32_t parts, file_.GetU32Or("split.count", 1));
  if (parts > 1) {
    return Fail(StatusCode::kUnsupported,
                "one of " + Number(parts) + " parts of a split model; merge them into one file first");
  }
  return Status::Ok();
}

Status GgufParser::ReadAlignment() {
  const auto entry = file_.entries_.find(std::string_view("general.alignment"));
  if (entry == file_.entries_.end()) return Status::Ok();
  if (entry->second.is_array || entry->second.type != static_cast<uint32_t>(ValueType::kU32)) {
    return file_.WrongType("general.alignment", entry->second, "u32");
  }
  ASSIGN_OR_RETURN(alignment_, file_.GetU32("general.alignment"));
  if (!std::has_single_bit(alignment_)) {
    return Fail(StatusCode::kInvalidArgument, "general.alignment " + Number(alignment_) + " is not a power of two");
  }
  if (alignment_ < limits_.alignment_bytes_min || alignment_ > limits_.alignment_bytes_max) {
    return Fail(StatusCode::kOutOfRange, "general.alignment " + Number(alignment_) + ", limits " +
                                             Number(limits_.alignment_bytes_min) + " to " +
                                             Number(limits_.alignment_bytes_max));
  }
  return Status::Ok();
}

Status GgufParser::ParseTensorInfo(uint64_t index) {
  std::string_view name;
  RETURN_IF_ERROR(ReadString("name of tensor " + Number(index), limits_.tensor_name_bytes_max, name));
  if (name.empty()) return Fail(StatusCode::kInvalidArgument, "tensor " + Number(index) + " has an empty name");
  if (name.find('\0') != std::string_view::npos) {
    return Fail(StatusCode::kInvalidArgument, "tensor name " + Quoted(name) + " holds a zero byte");
  }
  Tensor tensor;
  tensor.name = name;
  RETURN_IF_ERROR(ParseTensorShape(tensor));
  int32_t type = 0;
  RETURN_IF_ERROR(Read("type of tensor " + Quoted(name), type));
  RETURN_IF_ERROR(CheckTensorType(tensor, type));
  uint64_t offset = 0;
  RETURN_IF_ERROR(Read("offset of tensor " + Quoted(name), offset));
  if (offset % alignment_ != 0) {
    return Fail(StatusCode::kInvalidArgument, "tensor " + Quoted(name) + ": offset " + Number(offset) +
                                                  " is not a multiple of the alignment " + Number(alignment_));
  }
  if (!file_.tensor_index_.emplace(tensor.name, file_.tensors_.size()).second) {
    return Fail(StatusCode::kInvalidArgument, "tensor " + Quoted(name) + " appears twice");
  }
  offsets_.push_back(offset);
  file_.tensors_.push_back(std::move(tensor));
  return Status::Ok();
}

Status GgufParser::ParseTensorShape(Tensor& tensor) {
  const std::string what = "tensor " + Quoted(tensor.name);
  uint32_t n_dims = 0;
  RETURN_IF_ERROR(Read("dimension count of " + what, n_dims));
  if (n_dims < 1 || n_dims > kDimsMax) {
    return Fail(StatusCode::kInvalidArgument, what + " has " + Number(n_dims) + " dimensions, expected 1 to 4");
  }
  tensor.n_dims = static_cast<int>(n_dims);
  int64_t elements = 1;
  for (uint32_t d = 0; d < n_dims; ++d) {
    int64_t& size = tensor.ne[d];
    RETURN_IF_ERROR(Read("shape of " + what, size));
    if (size <= 0) {
      return Fail(StatusCode::kInvalidArgument,
                  what + ": dimension " + Number(d) + " is " + std::to_string(size) + ", expected at least 1");
    }
    if (size > limits_.dimension_max) {
      return Fail(StatusCode::kOutOfRange, what + ": dimension " + Number(d) + " is " + std::to_string(size) +
                                               ", limit " + std::to_string(limits_.dimension_max));
    }
    const std::optional<int64_t> product = CheckedMul(elements, size);
    if (!product || *product > limits_.elements_max) {
      return Fail(StatusCode::kOutOfRange,
                  what + " has more than " + std::to_string(limits_.elements_max) + " elements");
    }
    elements = *product;
  }
  return Status::Ok();
}

Status GgufParser::CheckTensorType(Tensor& tensor, int32_t type) {
  const std::string what = "tensor " + Quoted(tensor.name);
  const ggml_type_traits* traits =
      type >= 0 && type < GGML_TYPE_COUNT ? ggml_get_type_traits(static_cast<ggml_type>(type)) : nullptr;
  if (traits == nullptr || traits->blck_size <= 0 || traits->type_size == 0) {
    return Fail(StatusCode::kUnsupported,
                what + " has type " + std::to_string(type) + ", which the pinned ggml does not know");
  }
  if (type != GGML_TYPE_F32 && traits->to_float == nullptr) {
    return Fail(StatusCode::kUnsupported, what + " has type " + traits->type_name + " (" + std::to_string(type) +
                                              "), which cannot be turned into floats");
  }
  if (tensor.ne[0] % traits->blck_size != 0) {
    return Fail(StatusCode::kInvalidArgument, what + " " + ShapeText(tensor) + ": a row is not a multiple of the " +
                                                  std::to_string(traits->blck_size) + " elements of a " +
                                                  traits->type_name + " block");
  }
  tensor.type = static_cast<ggml_type>(type);
  const auto blocks = static_cast<size_t>(tensor.elements() / traits->blck_size);
  const std::optional<size_t> bytes = CheckedMul(blocks, traits->type_size);
  if (!bytes)
    return Fail(StatusCode::kOutOfRange, what + " " + ShapeText(tensor) + " is larger than an address can tell");
  tensor.size_bytes = *bytes;
  return Status::Ok();
}

Status GgufParser::PlaceTensors() {
  const uint64_t data_begin = RoundUp(position_, alignment_);
  std::map<ggml_type, size_t> bytes_of_type;
  for (size_t i = 0; i < file_.tensors_.size(); ++i) {
    Tensor& tensor = file_.tensors_[i];
    const std::optional<uint64_t> begin = CheckedAdd(data_begin, offsets_[i]);
    const std::optional<uint64_t> end = begin ? CheckedAdd(*begin, uint64_t{tensor.size_bytes}) : std::nullopt;
    if (!end || *end > file_.map_bytes_) {
      return Fail(StatusCode::kDataLoss, "tensor " + Quoted(tensor.name) + ": " + Number(tensor.size_bytes) +
                                             " bytes at offset " + Number(offsets_[i]) +
                                             " of the data (which begins at byte " + Number(data_begin) +
                                             ") pass the end of the file (" + Number(file_.map_bytes_) + " bytes)");
    }
    tensor.data = file_.map_ + *begin;
    bytes_of_type[tensor.type] += tensor.size_bytes;
  }
  const auto most = std::max_element(bytes_of_type.begin(), bytes_of_type.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
  file_.quantization_ = most == bytes_of_type.end() ? "none" : ggml_type_name(most->first);
  return Status::Ok();
}

Status GgufParser::CheckOverlaps() const {
  std::vector<size_t> order(file_.tensors_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return offsets_[a] < offsets_[b]; });
  for (size_t i = 1; i < order.size(); ++i) {
    const Tensor& before = file_.tensors_[order[i - 1]];
    const Tensor& after = file_.tensors_[order[i]];
    if (before.data + before.size_bytes > after.data) {
      return Fail(StatusCode::kDataLoss, "tensors " + Quoted(before.name) + " and " + Quoted(after.name) +
                                             " overlap at offset " + Number(offsets_[order[i]]));
    }
  }
  return Status::Ok();
}

}  // namespace jointkv::gguf
