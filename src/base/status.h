// Status and Expected<T>: how every room reports bad input, missing resources and I/O failure.
// Threads: plain values. Owns: its message. Fails how: never; a broken invariant is CHECK's job (base/check.h).
// A message names the thing, its value and the limit: "gguf: tensor 'a': offset 96 past end of file (64 bytes)".
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "base/check.h"

namespace jointkv {

enum class StatusCode {
  kOk,
  kInvalidArgument,    // the caller's value is wrong
  kNotFound,           // no such file, key or tensor
  kOutOfRange,         // a size, offset or count exceeds its limit
  kDataLoss,           // a file is truncated or contradicts itself
  kUnsupported,        // well-formed, but this build cannot run it
  kResourceExhausted,  // no memory, KV bytes or queue room
  kIo,                 // the operating system refused
  kCancelled,
  kInternal,
};

const char* StatusCodeName(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status Ok() { return {}; }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }
  // "OUT_OF_RANGE: gguf: ..."
  std::string ToString() const;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// A T, or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Expected {
 public:
  Expected(T value) : value_(std::move(value)) {}
  Expected(Status status) : value_(std::move(status)) { CHECK(!std::get<Status>(value_).ok()); }

  bool ok() const { return std::holds_alternative<T>(value_); }
  Status status() const { return ok() ? Status::Ok() : std::get<Status>(value_); }

  T& value() & {
    CHECK(ok());
    return std::get<T>(value_);
  }
  const T& value() const& {
    CHECK(ok());
    return std::get<T>(value_);
  }
  T&& value() && {
    CHECK(ok());
    return std::get<T>(std::move(value_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::variant<T, Status> value_;
};

}  // namespace jointkv

#define JOINTKV_CONCAT_INNER(a, b) a##b
#define JOINTKV_CONCAT(a, b) JOINTKV_CONCAT_INNER(a, b)

#define RETURN_IF_ERROR(expr)                                              \
  do {                                                                     \
    if (::jointkv::Status status_ = (expr); !status_.ok()) return status_; \
  } while (false)

// ASSIGN_OR_RETURN(auto x, MakeX());
#define ASSIGN_OR_RETURN(lhs, expr) ASSIGN_OR_RETURN_IMPL(JOINTKV_CONCAT(expected_, __LINE__), lhs, expr)
#define ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                          \
  if (!tmp.ok()) return tmp.status();         \
  lhs = std::move(tmp).value()
