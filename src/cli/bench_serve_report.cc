#include "cli/bench_serve_report.h"

#include <spdlog/fmt/fmt.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>

#include "cli/output_files.h"
#include "text/template_guard.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string Now() {
  const std::time_t now = std::time(nullptr);
  std::tm local = {};
  localtime_r(&now, &local);
  char text[32];
  return {text, std::strftime(text, sizeof(text), "%Y%m%d-%H%M%S", &local)};
}

Json RateJson(double rate) { return std::isinf(rate) ? Json("inf") : Json(rate); }

// A whole number where it is one.
Json RpsJson(double rps) { return rps == std::floor(rps) ? Json(static_cast<int64_t>(rps)) : Json(rps); }

// 2026-01-02T03:04:05.123456 in local time.
std::string IsoTime(std::chrono::system_clock::time_point time) {
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(time.time_since_epoch()).count();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(time);
  std::tm local = {};
  localtime_r(&seconds, &local);
  char text[32];
  const size_t size = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &local);
  return fmt::format("{}.{:06}", std::string(text, size), micros % 1'000'000);
}

Status Write(const std::string& path, bool append, const std::string& text) {
  std::FILE* file = std::fopen(path.c_str(), append ? "a" : "w");
  if (file == nullptr) return {StatusCode::kIo, "'" + path + "': " + std::strerror(errno)};
  bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  written = std::fclose(file) == 0 && written;
  if (!written) return {StatusCode::kIo, "'" + path + "': " + std::strerror(errno)};
  return Status::Ok();
}

}  // namespace

ServeTableHead TableHead(const ServeFlags& flags) {
  ServeTableHead head = {.max_concurrency = flags.max_concurrency, .request_rate = std::nullopt};
  if (!std::isinf(flags.arrival.request_rate)) head.request_rate = flags.arrival.request_rate;
  return head;
}

nlohmann::ordered_json ServeResultJson(const ServeFlags& flags, const std::string& date,
                                       const nlohmann::ordered_json& metrics) {
  Json json = {{"date", date},
               {"endpoint_type", flags.backend},
               {"backend", flags.backend},
               {"label", flags.label.empty() ? Json() : Json(flags.label)},
               {"model_id", flags.body.model},
               {"tokenizer_id", flags.dataset.name == "random" ? Json(flags.dataset.tokenizer_path) : Json()},
               {"dataset_name", flags.dataset.name},
               {"num_prompts", flags.dataset.num_prompts}};
  for (const auto& [key, value] : flags.metadata) json[key] = value;
  json["request_rate"] = RateJson(flags.arrival.request_rate);
  json["burstiness"] = RateJson(flags.arrival.burstiness);
  json["max_concurrency"] = flags.max_concurrency ? Json(*flags.max_concurrency) : Json();
  if (const auto& ramp_up = flags.arrival.ramp_up) {
    json["ramp_up_strategy"] = ramp_up->exponential ? "exponential" : "linear";
    json["ramp_up_start_rps"] = RpsJson(ramp_up->start_rps);
    json["ramp_up_end_rps"] = RpsJson(ramp_up->end_rps);
  }
  json.update(metrics);
  return json;
}

std::string ServeResultPath(const ServeFlags& flags, const std::string& date) {
  std::string name = flags.result_filename;
  if (name.empty()) {
    const std::string& model = flags.body.model;
    const std::string concurrency =
        flags.max_concurrency ? fmt::format("-concurrency{}", *flags.max_concurrency) : std::string();
    std::string rate = fmt::format("{}qps", flags.arrival.request_rate);
    if (const auto& ramp_up = flags.arrival.ramp_up) {
      rate = fmt::format("ramp-up-{}-{}qps-{}qps", ramp_up->exponential ? "exponential" : "linear", ramp_up->start_rps,
                         ramp_up->end_rps);
    }
    name = fmt::format("{}-{}{}-{}-{}.json", flags.label.empty() ? flags.backend : flags.label, rate, concurrency,
                       model.substr(model.rfind('/') + 1), date);
  }
  return flags.result_dir.empty() ? name : (std::filesystem::path(flags.result_dir) / name).string();
}

Status PrepareServeResult(const ServeFlags& flags) {
  if (!flags.save_result && !flags.append_result) return Status::Ok();
  std::error_code error;
  if (!flags.result_dir.empty()) std::filesystem::create_directories(flags.result_dir, error);
  if (error) return {StatusCode::kIo, "--result-dir '" + flags.result_dir + "': " + error.message()};
  return CheckOutputs({{"--dataset-path", flags.dataset.path}, {"--tokenizer", flags.dataset.tokenizer_path}},
                      {{"--result-filename", ServeResultPath(flags, Now())}});
}

nlohmann::ordered_json RateChangesJson(const std::vector<RateChange>& changes,
                                       std::chrono::system_clock::time_point start) {
  Json json = Json::array();
  for (const RateChange& change : changes) {
    const auto since =
        std::chrono::duration_cast<std::chrono::system_clock::duration>(std::chrono::duration<double>(change.at_s));
    json.push_back({{"rps", RpsJson(change.rps)}, {"timestamp", IsoTime(start + since)}});
  }
  return json;
}

Status SaveServeResult(const ServeFlags& flags, const nlohmann::ordered_json& metrics, bool interrupted) {
  if (!flags.save_result && !flags.append_result) return Status::Ok();
  const std::string date = Now();
  Json json = ServeResultJson(flags, date, metrics);
  if (interrupted) json["interrupted"] = true;
  const std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  return Write(ServeResultPath(flags, date), flags.append_result, text);
}

std::string FirstModelId(std::string_view body) {
  if (!text::CheckJsonDepth(body, "models").ok()) return "";
  const nlohmann::json json = nlohmann::json::parse(body, nullptr, false);
  if (!json.is_object() || !json.contains("data") || !json["data"].is_array() || json["data"].empty()) return "";
  const nlohmann::json& model = json["data"].front();
  return model.is_object() && model.contains("id") && model["id"].is_string() ? model["id"].get<std::string>() : "";
}

}  // namespace jointkv::cli
