// Reading fields of a client's JSON. All throw an ApiError that names the field.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/ids.h"
#include "server/api_error.h"

namespace jointkv::server {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

// The body as an object, nested at most `depth_max` deep.
Json ParseObject(std::string_view body, int depth_max);

// One field of an object's text with all keys in the order in which they stand there, which Json forgets. At most
// `keys_max` keys: each costs a search among those beside it.
OrderedJson InOrder(std::string_view body, const std::string& field, size_t keys_max);

// Null counts as absent.
const Json* Find(const Json& object, const char* key);

const std::string& String(const Json& value, const std::string& field);
int Integer(const Json& value, const std::string& field);
float Number(const Json& value, const std::string& field);
bool Bool(const Json& value, const std::string& field);
const Json& Array(const Json& value, const std::string& field, size_t size_max);
const Json& Object(const Json& value, const std::string& field);
std::vector<TokenId> Tokens(const Json& value, const std::string& field, size_t size_max);

std::string At(const std::string& field, size_t index);
std::string StringOr(const Json& object, const char* key, const std::string& field, const std::string& fallback = "");
bool BoolOr(const Json& object, const char* key, bool fallback);

}  // namespace jointkv::server
