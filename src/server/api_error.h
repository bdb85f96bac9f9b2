// Errors in OpenAI's shape. Code that reads a request throws an ApiError; the router catches it and answers.
#pragma once

#include <string>

#include "base/status.h"

namespace jointkv::server {

struct ApiError {
  int status = 400;
  std::string message;
  std::string type = "invalid_request_error";
  std::string param = {};  // the field; empty: null
  std::string code = {};   // empty: null
  int retry_after_s = 0;   // 0: no such header
  // For callers that do not speak HTTP.
  StatusCode status_code = StatusCode::kInvalidArgument;
};

// 400. The message begins with the field.
ApiError BadField(const std::string& field, const std::string& what);
// The same, kOutOfRange.
ApiError OutOfRange(const std::string& field, const std::string& what);
// 400, code context_length_exceeded.
ApiError ContextExceeded(const std::string& field, const std::string& what);
// 503, to be tried again.
ApiError Unavailable(const std::string& code, const std::string& message);
// 429, to be tried again.
ApiError RateLimited(const std::string& message);
// What the engine refused, with the field by its name in the API.
ApiError FromEngine(const Status& status);

// {"error": {"message", "type", "param", "code"}}
std::string ErrorBody(const ApiError& error);

}  // namespace jointkv::server
