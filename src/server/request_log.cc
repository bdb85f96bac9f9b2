#include "server/request_log.h"

#include <spdlog/fmt/fmt.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cmath>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

namespace jointkv::server {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kPathBytesMax = 200;

// What a client sent, fit for a line of a log. Of a request that could not be read it may be nothing.
std::string Printable(std::string_view text) {
  if (text.empty()) return "-";
  std::string out;
  for (const char c : text.substr(0, kPathBytesMax)) out += c > ' ' && c < 0x7F && c != '"' ? c : '?';
  return out;
}

double Milliseconds(double seconds) { return std::round(seconds * 1e4) / 10; }

}  // namespace

RequestLog::RequestLog(LogFormat format)
    : format_(format),
      logger_(std::make_shared<spdlog::logger>("jointkv", std::make_shared<spdlog::sinks::stderr_sink_mt>())) {
  logger_->set_pattern(format == LogFormat::kJson ? "%v" : "%Y-%m-%d %H:%M:%S.%e %l %v");
  logger_->flush_on(spdlog::level::info);
}

void RequestLog::Write(const RequestLine& line) {
  if (format_ == LogFormat::kText) {
    std::string text = fmt::format("{} {} {} {} {} {:.1f} ms", line.id, line.tenant.empty() ? "-" : line.tenant,
                                   Printable(line.method), Printable(line.path), line.status, line.duration_s * 1000);
    if (line.generates) {
      const std::string ttft = line.ttft_s > 0 ? fmt::format("ttft {:.1f} ms, ", line.ttft_s * 1000) : "";
      text += fmt::format(", prompt {} cached {} output {}, {}{}", line.prompt_tokens, line.cached_tokens,
                          line.output_tokens, ttft, line.finish);
    }
    logger_->info(text);
    return;
  }
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  Json row = {{"time", std::round(std::chrono::duration<double>(now).count() * 1000) / 1000},
              {"request_id", line.id},
              {"tenant", line.tenant.empty() ? Json(nullptr) : Json(line.tenant)},
              {"method", Printable(line.method)},
              {"path", Printable(line.path)},
              {"status", line.status},
              {"duration_ms", Milliseconds(line.duration_s)}};
  if (line.generates) {
    row["prompt_tokens"] = line.prompt_tokens;
    row["cached_tokens"] = line.cached_tokens;
    row["output_tokens"] = line.output_tokens;
    row["ttft_ms"] = line.ttft_s > 0 ? Json(Milliseconds(line.ttft_s)) : Json(nullptr);
    row["finish_reason"] = line.finish;
  }
  logger_->info(row.dump(-1, ' ', false, Json::error_handler_t::replace));
}

void RequestLog::Info(const std::string& message) {
  logger_->info(format_ == LogFormat::kJson ? Json{{"message", message}}.dump() : message);
}

}  // namespace jointkv::server
