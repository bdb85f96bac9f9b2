#include "server/api_error.h"

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>

#include <nlohmann/json.hpp>

namespace jointkv::server {
namespace {

// "sampling: stop_tokens token is 9, must be ..." as "stop_token_ids: token is 9, must be ...": the field comes first,
// by the API's name.
std::pair<std::string, std::string> FieldAndMessage(std::string message) {
  constexpr std::string_view kSampling = "sampling: ";
  constexpr std::string_view kLength = "length in bytes of ";
  if (!message.starts_with(kSampling)) return {message.substr(0, message.find(':')), message};
  message.erase(0, kSampling.size());
  if (message.starts_with(kLength)) return {"stop", "stop: " + message};
  const size_t end = message.find(' ');
  std::string field = message.substr(0, end);
  if (field == "stop_tokens") field = "stop_token_ids";
  return {field, field + ":" + message.substr(std::min(end, message.size()))};
}

bool IsName(const std::string& word) {
  return !word.empty() && word.find_first_not_of("abcdefghijklmnopqrstuvwxyz_0123456789") == std::string::npos;
}

}  // namespace

ApiError BadField(const std::string& field, const std::string& what) {
  return {.status = 400, .message = field + ": " + what, .param = field, .code = "invalid_value"};
}

ApiError OutOfRange(const std::string& field, const std::string& what) {
  ApiError error = BadField(field, what);
  error.status_code = StatusCode::kOutOfRange;
  return error;
}

ApiError ContextExceeded(const std::string& field, const std::string& what) {
  return {.status = 400, .message = field + ": " + what, .param = field, .code = "context_length_exceeded"};
}

ApiError Unavailable(const std::string& code, const std::string& message) {
  return {.status = 503, .message = message, .type = "server_error", .code = code, .retry_after_s = 2};
}

ApiError RateLimited(const std::string& message) {
  return {
      .status = 429, .message = message, .type = "rate_limit_error", .code = "rate_limit_exceeded", .retry_after_s = 1};
}

ApiError FromEngine(const Status& status) {
  const std::string& message = status.message();
  ApiError error{.message = message};
  switch (status.code()) {
    case StatusCode::kResourceExhausted: error.code = "context_length_exceeded"; break;
    case StatusCode::kInvalidArgument:
    case StatusCode::kOutOfRange: error.code = "invalid_value"; break;
    case StatusCode::kUnsupported: error.code = "unsupported_value"; break;
    default: error = {.status = 500, .message = message, .type = "server_error"}; return error;
  }
  std::string field;
  std::tie(field, error.message) = FieldAndMessage(message);
  if (field == "embed") field = "input";
  if (IsName(field) && field != "request") error.param = field;
  return error;
}

std::string ErrorBody(const ApiError& error) {
  using Json = nlohmann::ordered_json;
  const auto or_null = [](const std::string& text) { return text.empty() ? Json(nullptr) : Json(text); };
  const Json body = {{"error",
                      {{"message", error.message},
                       {"type", error.type},
                       {"param", or_null(error.param)},
                       {"code", or_null(error.code)}}}};
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace jointkv::server
