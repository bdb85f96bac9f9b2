#include "server/json_fields.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace jointkv::server {
namespace {

// Before parsing, so that nesting costs no memory. Brackets in strings do not count.
int DepthOf(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

[[noreturn]] void WrongType(const std::string& field, const char* expected, const Json& value) {
  throw ApiError{.message = field + ": expected " + expected + ", got " + value.type_name(),
                 .param = field,
                 .code = "invalid_type"};
}

}  // namespace

Json ParseObject(std::string_view body, int depth_max) {
  const auto bad = [](const std::string& message) { return ApiError{.message = message, .code = "invalid_json"}; };
  if (const int depth = DepthOf(body); depth > depth_max) {
    throw bad("the body is nested " + std::to_string(depth) + " deep, limit " + std::to_string(depth_max));
  }
  Json json;
  try {
    json = Json::parse(body);
  } catch (const Json::exception& error) {
    // Without the library's own prefix, "[json.exception.parse_error.101] ".
    const std::string_view what = error.what();
    throw bad("the body is not JSON: " + std::string(what.substr(what.starts_with('[') ? what.find("] ") + 2 : 0)));
  }
  if (!json.is_object()) throw bad(std::string("the body must be a JSON object, got ") + json.type_name());
  return json;
}

OrderedJson InOrder(std::string_view body, const std::string& field, size_t keys_max) {
  size_t keys = 0;
  bool inside = false;
  const auto keep = [&](int depth, OrderedJson::parse_event_t event, OrderedJson& parsed) {
    if (event != OrderedJson::parse_event_t::key) return true;
    if (depth == 1) return inside = parsed == field;
    if (inside && ++keys > keys_max) throw BadField(field, "has more than " + std::to_string(keys_max) + " keys");
    return true;
  };
  return OrderedJson::parse(body, keep)[field];
}

const Json* Find(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

const std::string& String(const Json& value, const std::string& field) {
  if (!value.is_string()) WrongType(field, "a string", value);
  return value.get_ref<const std::string&>();
}

int Integer(const Json& value, const std::string& field) {
  if (!value.is_number_integer()) WrongType(field, "a whole number", value);
  const bool fits =
      value.is_number_unsigned() ? std::in_range<int>(value.get<uint64_t>()) : std::in_range<int>(value.get<int64_t>());
  if (!fits) throw OutOfRange(field, value.dump() + " does not fit 32 bits");
  return value.get<int>();
}

float Number(const Json& value, const std::string& field) {
  if (!value.is_number()) WrongType(field, "a number", value);
  const double number = value.get<double>();
  if (!(std::abs(number) <= std::numeric_limits<float>::max())) throw BadField(field, value.dump() + " is too large");
  return static_cast<float>(number);
}

bool Bool(const Json& value, const std::string& field) {
  if (!value.is_boolean()) WrongType(field, "true or false", value);
  return value.get<bool>();
}

const Json& Array(const Json& value, const std::string& field, size_t size_max) {
  if (!value.is_array()) WrongType(field, "an array", value);
  if (value.size() > size_max) {
    throw OutOfRange(field, std::to_string(value.size()) + " entries, at most " + std::to_string(size_max));
  }
  return value;
}

const Json& Object(const Json& value, const std::string& field) {
  if (!value.is_object()) WrongType(field, "an object", value);
  return value;
}

std::vector<TokenId> Tokens(const Json& value, const std::string& field, size_t size_max) {
  std::vector<TokenId> tokens;
  Array(value, field, size_max);
  tokens.reserve(value.size());
  for (size_t i = 0; i < value.size(); ++i) tokens.push_back(Integer(value[i], At(field, i)));
  return tokens;
}

std::string At(const std::string& field, size_t index) { return field + "[" + std::to_string(index) + "]"; }

std::string StringOr(const Json& object, const char* key, const std::string& field, const std::string& fallback) {
  const Json* value = Find(object, key);
  return value == nullptr ? fallback : String(*value, field.empty() ? key : field + "." + key);
}

bool BoolOr(const Json& object, const char* key, bool fallback) {
  const Json* value = Find(object, key);
  return value == nullptr ? fallback : Bool(*value, key);
}

}  // namespace jointkv::server
