// A streamed completion as it comes over the wire: server-sent events, and what an OpenAI server says in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace jointkv::cli {

// Splits a body into the data of its events; comments and other fields are dropped. Threads: one. Owns: the unfinished
// event. Fails how: kOutOfRange for an event above kEventBytesMax.
class SseParser {
 public:
  static constexpr size_t kEventBytesMax = size_t{4} << 20;

  Status Take(std::string_view bytes, const std::function<void(std::string_view data)>& on_event);

 private:
  void EndLine(const std::function<void(std::string_view data)>& on_event);

  std::string line_;
  std::string data_;
  bool has_data_ = false;
  bool after_return_ = false;  // a '\n' right after '\r' ends no further line
};

// What became of one request. Times in seconds; those of the request itself count from the start of the run.
struct RequestOutcome {
  bool success = false;
  std::string error;
  double arrival_s = 0;  // when it was due; sent later when the limit of concurrent requests was reached
  double start_s = 0;    // when it was sent
  double ttft_s = 0;     // from sending to the first text
  double latency_s = 0;  // from sending to the last text or the finish reason
  std::vector<double> itl_s;
  int64_t prompt_tokens = 0;  // as the server counted; 0 when it did not say
  int64_t cached_tokens = 0;
  int64_t output_tokens = 0;  // as the server counted, otherwise events with text
  std::string text;
};

// Collects one completion from its events. Threads: one. Owns: the outcome. Fails how: Take and Finish say why the
// completion is unusable: not JSON, an error event, or an end before the end.
class CompletionReader {
 public:
  explicit CompletionReader(double sent_s) : sent_s_(sent_s), last_s_(sent_s) {}

  Status Take(std::string_view data, double now_s);
  // After the last event. `outcome` gets times and tokens in any case.
  Status Finish(RequestOutcome& outcome);

 private:
  double sent_s_;
  double last_s_;  // latest text
  bool ended_ = false;
  int64_t text_events_ = 0;
  bool counted_ = false;
  RequestOutcome outcome_;
};

// The tokens of an answer with embeddings, which is not streamed. Says what makes it unusable.
Status ReadEmbeddings(std::string_view body, RequestOutcome& outcome);

// The message of an error answer: its error.message where it has that form, otherwise the start of the body.
std::string ErrorMessage(int http_status, std::string_view body);

}  // namespace jointkv::cli
