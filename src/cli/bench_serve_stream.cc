#include "cli/bench_serve_stream.h"

#include <algorithm>

#include <nlohmann/json.hpp>

#include "text/template_guard.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::json;

constexpr size_t kShownBytesMax = 300;

const Json* Find(const Json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::string StringOf(const Json* value) {
  return value != nullptr && value->is_string() ? value->get<std::string>() : "";
}

int64_t CountOf(const Json* value) {
  return value != nullptr && value->is_number_integer() ? std::max<int64_t>(value->get<int64_t>(), 0) : 0;
}

std::string Shown(std::string_view text) {
  std::string shown(text.substr(0, kShownBytesMax));
  std::ranges::replace_if(
      shown, [](char c) { return static_cast<unsigned char>(c) < ' '; }, ' ');
  return shown;
}

Expected<Json> ParseEvent(std::string_view data) {
  RETURN_IF_ERROR(text::CheckJsonDepth(data, "event"));
  Json event = Json::parse(data, nullptr, false);
  if (!event.is_object()) return Status(StatusCode::kInvalidArgument, "event is not a JSON object: " + Shown(data));
  return event;
}

std::string ErrorOf(const Json& error) {
  const std::string message = StringOf(Find(error, "message"));
  return message.empty() ? Shown(error.dump(-1, ' ', false, Json::error_handler_t::replace)) : Shown(message);
}

// Text of a completion's or a chat's choice, thoughts and arguments of tool calls included.
std::string TextOf(const Json& choice) {
  std::string text = StringOf(Find(choice, "text"));
  const Json* delta = Find(choice, "delta");
  if (delta == nullptr) return text;
  for (const char* key : {"reasoning_content", "reasoning", "content"}) text += StringOf(Find(*delta, key));
  const Json* calls = Find(*delta, "tool_calls");
  if (calls == nullptr || !calls->is_array()) return text;
  for (const Json& call : *calls) {
    const Json* function = Find(call, "function");
    if (function == nullptr) continue;
    text += StringOf(Find(*function, "name")) + StringOf(Find(*function, "arguments"));
  }
  return text;
}

}  // namespace

Status SseParser::Take(std::string_view bytes, const std::function<void(std::string_view data)>& on_event) {
  while (!bytes.empty()) {
    if (after_return_ && bytes.front() == '\n') {
      after_return_ = false;
      bytes.remove_prefix(1);
      continue;
    }
    after_return_ = false;
    const size_t end = bytes.find_first_of("\r\n");
    const std::string_view piece = bytes.substr(0, end);
    if (line_.size() + data_.size() + piece.size() > kEventBytesMax) {
      return {StatusCode::kOutOfRange, "an event has more than " + std::to_string(kEventBytesMax) + " bytes"};
    }
    line_ += piece;
    if (end == std::string_view::npos) break;
    after_return_ = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
    EndLine(on_event);
  }
  return Status::Ok();
}

void SseParser::EndLine(const std::function<void(std::string_view data)>& on_event) {
  if (line_.empty()) {
    if (has_data_) on_event(data_);
    data_.clear();
    has_data_ = false;
    return;
  }
  constexpr std::string_view kData = "data:";
  if (line_.starts_with(kData)) {
    std::string_view value = std::string_view(line_).substr(kData.size());
    if (value.starts_with(' ')) value.remove_prefix(1);
    if (has_data_) data_ += '\n';
    data_ += value;
    has_data_ = true;
  }
  line_.clear();
}

Status CompletionReader::Take(std::string_view data, double now_s) {
  if (data == "[DONE]") {
    ended_ = true;
    return Status::Ok();
  }
  ASSIGN_OR_RETURN(const Json event, ParseEvent(data));
  if (const Json* error = Find(event, "error")) return {StatusCode::kInternal, ErrorOf(*error)};
  if (const Json* usage = Find(event, "usage")) {
    outcome_.prompt_tokens = CountOf(Find(*usage, "prompt_tokens"));
    outcome_.output_tokens = CountOf(Find(*usage, "completion_tokens"));
    if (const Json* details = Find(*usage, "prompt_tokens_details")) {
      outcome_.cached_tokens = CountOf(Find(*details, "cached_tokens"));
    }
    counted_ = true;
  }
  const Json* choices = Find(event, "choices");
  if (choices == nullptr || !choices->is_array() || choices->empty()) return Status::Ok();
  const Json& choice = choices->front();
  const std::string text = TextOf(choice);
  if (!text.empty()) {
    outcome_.text += text;
    if (text_events_ == 0) {
      outcome_.ttft_s = now_s - sent_s_;
    } else {
      outcome_.itl_s.push_back(now_s - last_s_);
    }
    ++text_events_;
    last_s_ = now_s;
  }
  const bool finished = !StringOf(Find(choice, "finish_reason")).empty();
  ended_ = ended_ || finished;
  if (!text.empty() || finished) outcome_.latency_s = now_s - sent_s_;
  return Status::Ok();
}

Status CompletionReader::Finish(RequestOutcome& outcome) {
  if (!counted_) outcome_.output_tokens = text_events_;
  if (text_events_ == 0) outcome_.ttft_s = outcome_.latency_s;
  outcome_.arrival_s = outcome.arrival_s;
  outcome_.start_s = outcome.start_s;
  outcome = std::move(outcome_);
  if (!ended_) return {StatusCode::kDataLoss, "the stream ended without a finish reason or [DONE]"};
  return Status::Ok();
}

Status ReadEmbeddings(std::string_view body, RequestOutcome& outcome) {
  RETURN_IF_ERROR(text::CheckJsonDepth(body, "answer"));
  const Json answer = Json::parse(body, nullptr, false);
  const Json* data = Find(answer, "data");
  if (data == nullptr || !data->is_array() || data->empty()) {
    return {StatusCode::kInvalidArgument, "the answer has no embeddings: " + Shown(body)};
  }
  if (const Json* usage = Find(answer, "usage")) outcome.prompt_tokens = CountOf(Find(*usage, "prompt_tokens"));
  return Status::Ok();
}

std::string ErrorMessage(int http_status, std::string_view body) {
  std::string message = "HTTP " + std::to_string(http_status);
  const Json json = text::CheckJsonDepth(body, "answer").ok() ? Json::parse(body, nullptr, false) : Json();
  const Json* error = Find(json, "error");
  if (error != nullptr) return message + ": " + ErrorOf(*error);
  return body.empty() ? message : message + ": " + Shown(body);
}

}  // namespace jointkv::cli
