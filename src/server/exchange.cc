#include "server/exchange.h"

#include <utility>

#include "base/clock.h"

namespace jointkv::server {

Exchange::Exchange(RequestLog& log, const HttpRequest& request, std::string id, std::shared_ptr<ReplyChannel> channel)
    : log_(&log), channel_(std::move(channel)), received_s_(MonotonicSeconds()) {
  line_.id = std::move(id);
  line_.method = request.method;
  line_.path = request.path;
  AddHeader("X-Request-Id", line_.id);
}

void Exchange::Reply(HttpResponse response) {
  Log(response.status);
  response.headers.insert(response.headers.end(), headers_.begin(), headers_.end());
  channel_->Reply(std::move(response));
}

void Exchange::ReplyError(const ApiError& error) {
  HttpResponse response{.status = error.status, .body = ErrorBody(error)};
  if (error.retry_after_s > 0) response.headers.emplace_back("Retry-After", std::to_string(error.retry_after_s));
  if (error.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  Reply(std::move(response));
}

void Exchange::BeginStream() { channel_->BeginStream(headers_); }

void Exchange::EndStream() {
  Log(200);
  channel_->EndStream();
}

void Exchange::Gone() { Log(499); }

void Exchange::Log(int status) {
  line_.status = status;
  line_.duration_s = MonotonicSeconds() - received_s_;
  if (!line_.quiet || status >= 400) log_->Write(line_);
}

}  // namespace jointkv::server
