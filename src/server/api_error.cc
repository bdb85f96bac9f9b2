#include "server/api_error.h"

#include <utility>

#include <nlohmann/json.hpp>

namespace jointkv::server {
namespace {

// SamplingParams' names where the API's differ.
std::string ApiName(const std::string& field) {
  if (field == "stop_tokens") return "stop_token_ids";
  if (field == "logprobs") return "top_logprobs";
  return field;
}

bool IsName(const std::string& word) {
  return !word.empty() && word.find_first_not_of("abcdefghijklmnopqrstuvwxyz_0123456789") == std::string::npos;
}

}  // namespace

ApiError BadField(const std::string& field, const std::string& what) {
  return {.status = 400, .message = field + ": " + what, .param = field, .code = "invalid_value"};
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
    default: error = {.status = 500, .message = message, .type = "server_error"}; return error;
  }
  // "temperature: ...", "logit_bias of token 5: ...", "length in bytes of stop[0]: ..."
  std::string field = message.substr(0, message.find_first_of(": "));
  if (message.starts_with("length in bytes of ")) field = "stop";
  if (IsName(field)) error.param = ApiName(field);
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
