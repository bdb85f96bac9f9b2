#include "cli/bench_serve_options.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "cli/engine_options.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::ordered_json;

// As they were typed; FinishFlags reads them.
struct Texts {
  std::string percentile_metrics = "ttft,tpot,itl";
  std::string metric_percentiles = "99";
  std::vector<std::string> goodput;
  std::vector<std::string> headers;
  std::vector<std::string> metadata;
  std::string extra_body;
  std::string served_model_name;
  std::optional<int> input_len;
  std::optional<int> output_len;
  std::optional<int> custom_output_len;
  bool no_oversample = false;
  bool disable_shuffle = false;
  std::vector<std::pair<std::string, std::shared_ptr<double>>> sampling;
  CLI::App* app = nullptr;
};

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::pair<std::string, std::string> KeyAndValue(const char* flag, const std::string& text, char separator) {
  const size_t at = text.find(separator);
  if (at == std::string::npos || at == 0) {
    throw CLI::ValidationError(flag, "'" + text + "' is not of the form KEY" + separator + "VALUE");
  }
  return {text.substr(0, at), text.substr(at + 1)};
}

double Number(const char* flag, const std::string& text, double least, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != 0 || !(value >= least && value <= most)) {
    throw CLI::ValidationError(
        flag, "'" + text + "' is not a number from " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

void FinishStats(const Texts& texts, ServeStatsOptions& stats) {
  stats.metrics = Split(texts.percentile_metrics, ',');
  for (const std::string& metric : stats.metrics) {
    if (FindServeMetric(metric) == nullptr) {
      throw CLI::ValidationError("--percentile-metrics", "there is no metric '" + metric + "'");
    }
  }
  stats.percentiles.clear();
  for (const std::string& percentile : Split(texts.metric_percentiles, ',')) {
    stats.percentiles.push_back(Number("--metric-percentiles", percentile, 0, 100));
  }
  stats.goals.clear();
  for (const std::string& goal : texts.goodput) {
    const auto [metric, limit] = KeyAndValue("--goodput", goal, ':');
    if (metric != "ttft" && metric != "tpot" && metric != "e2el") {
      throw CLI::ValidationError("--goodput", "'" + metric + "' is none of ttft, tpot and e2el");
    }
    stats.goals.push_back({metric, Number("--goodput", limit, 0, 1e12)});
  }
}

void FinishBody(const Texts& texts, ServeFlags& flags) {
  flags.body.chat = flags.backend == "openai-chat";
  if (flags.endpoint.empty()) flags.endpoint = flags.body.chat ? "/v1/chat/completions" : "/v1/completions";
  if (!flags.endpoint.starts_with('/')) throw CLI::ValidationError("--endpoint", "must start with /");
  if (!texts.served_model_name.empty()) flags.body.model = texts.served_model_name;
  flags.body.ignore_eos = flags.body.ignore_eos || flags.dataset.name == "random";
  for (const auto& [name, value] : texts.sampling) {
    if (texts.app->count("--" + name) == 0) continue;
    std::string field = name;
    std::ranges::replace(field, '-', '_');
    flags.body.extra[field] = field == "top_k" ? Json(std::llround(*value)) : Json(*value);
  }
  if (texts.extra_body.empty()) return;
  const Json extra = Json::parse(texts.extra_body, nullptr, false);
  if (!extra.is_object()) throw CLI::ValidationError("--extra-body", "is not a JSON object");
  flags.body.extra.update(extra);
}

void FinishHeaders(const Texts& texts, HttpHeaders& headers) {
  headers.clear();
  if (const char* key = std::getenv("OPENAI_API_KEY"); key != nullptr && *key != 0) {
    headers.emplace_back("Authorization", std::string("Bearer ") + key);
  }
  for (const std::string& header : texts.headers) {
    headers.push_back(KeyAndValue("--header", header, '='));
    const auto bad = [](char c) { return static_cast<unsigned char>(c) < ' '; };
    if (std::ranges::any_of(header, bad)) throw CLI::ValidationError("--header", "has a control character");
  }
}

void FinishFlags(const Texts& texts, ServeFlags& flags) {
  if (!(flags.arrival.request_rate > 0)) throw CLI::ValidationError("--request-rate", "must be more than 0, or inf");
  if (!(flags.arrival.burstiness > 0)) throw CLI::ValidationError("--burstiness", "must be more than 0");
  flags.arrival.seed = flags.dataset.seed;
  if (texts.input_len) flags.dataset.random.input = *texts.input_len;
  flags.dataset.output_tokens = texts.output_len;
  if (texts.output_len && flags.dataset.name == "random") {
    flags.dataset.random.output = *texts.output_len;
    flags.dataset.output_tokens.reset();  // the range ratio holds for it
  }
  const bool custom = texts.custom_output_len && *texts.custom_output_len > 0 && flags.dataset.name == "custom";
  if (custom) flags.dataset.output_tokens = texts.custom_output_len;
  flags.dataset.oversample = !texts.no_oversample;
  flags.dataset.shuffle = !texts.disable_shuffle;
  FinishStats(texts, flags.stats);
  FinishBody(texts, flags);
  FinishHeaders(texts, flags.headers);
  flags.metadata.clear();
  for (const std::string& item : texts.metadata) flags.metadata.push_back(KeyAndValue("--metadata", item, '='));
}

void AddTarget(CLI::App& app, ServeFlags& flags, Texts& texts) {
  app.add_option("--backend", flags.backend, "openai: /v1/completions with plain text; openai-chat: messages")
      ->check(CLI::IsMember({"openai", "openai-chat"}))
      ->capture_default_str();
  app.add_option("--base-url", flags.base_url, "in place of host and port")->type_name("http://HOST:PORT");
  app.add_option("--host", flags.host)->capture_default_str();
  app.add_option("--port", flags.port)->check(CLI::Range(1, 65535))->capture_default_str();
  app.add_option("--endpoint", flags.endpoint, "default by backend")->type_name("PATH");
  app.add_option("--header", texts.headers, "further headers of each request; OPENAI_API_KEY is sent as the bearer")
      ->type_name("KEY=VALUE");
  app.add_option("--model", flags.body.model, "model to ask for (default: the server's first)");
  app.add_option("--served-model-name", texts.served_model_name, "the same, as the server calls it");
  app.add_option("--ready-check-timeout-sec", flags.ready_check_timeout_s, "wait so long until the server is ready")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_option("--request-timeout-sec", flags.request_timeout_s, "of one request")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
}

void AddDataset(CLI::App& app, ServeFlags& flags, Texts& texts) {
  DatasetOptions& dataset = flags.dataset;
  const auto number = [&app](const char* flag, auto& value, int least, int most, const char* help) {
    return app.add_option(flag, value, help)->check(CLI::Range(least, most))->type_name("N");
  };
  app.add_option("--dataset-name", dataset.name, "what is asked")
      ->check(CLI::IsMember(DatasetNames()))
      ->capture_default_str();
  app.add_option("--dataset-path,--docs", dataset.path,
                 "custom: rows with prompt or messages; rag-pool and the like: real documents, as for `eval`")
      ->type_name("FILE.jsonl");
  number("--num-prompts", dataset.num_prompts, 1, 1 << 20, "requests")->capture_default_str();
  app.add_option("--seed", dataset.seed, "of the prompts and of their arrival")->capture_default_str();
  number("--input-len", texts.input_len, 1, 1 << 20, "the same as --random-input-len");
  number("--output-len", texts.output_len, 1, 1 << 20, "output tokens of each request, whatever the data set");
  number("--custom-output-len", texts.custom_output_len, -1, 1 << 20,
         "output tokens of a custom row; -1: its output_tokens, or 256");
  number("--random-input-len", dataset.random.input, 1, 1 << 20, "tokens of a random prompt")->capture_default_str();
  number("--random-output-len", dataset.random.output, 1, 1 << 20, "tokens of its output")->capture_default_str();
  number("--random-prefix-len", dataset.random.prefix, 0, 1 << 20, "tokens that all begin with")->capture_default_str();
  app.add_option("--random-range-ratio", dataset.random.range_ratio, "both lengths lie within 1 +- this of the above")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  dataset.tokenizer_path = DefaultModelPath();
  app.add_option("--tokenizer", dataset.tokenizer_path, "model file whose words make random prompts")
      ->type_name("GGUF")
      ->capture_default_str();
  number("--pool", dataset.workload.pool, 1, 1 << 16, "documents that rag-pool and few-shot draw from")
      ->capture_default_str();
  number("--documents", dataset.workload.documents, 1, 1 << 10, "documents in each prompt")->capture_default_str();
  app.add_option("--save-dataset", flags.save_dataset_path, "write the requests there as a custom data set; send none")
      ->type_name("FILE.jsonl");
  app.add_flag("--no-oversample", texts.no_oversample, "fail when a custom file has too few rows");
  app.add_flag("--disable-shuffle", texts.disable_shuffle, "keep the order of a custom file");
}

void AddLoad(CLI::App& app, ServeFlags& flags, Texts& texts) {
  app.add_option("--request-rate", flags.arrival.request_rate, "requests a second; inf: all at once")
      ->capture_default_str();
  app.add_option("--burstiness", flags.arrival.burstiness,
                 "shape of the gamma distributed gaps; 1: Poisson, less: bursts, more: even")
      ->capture_default_str();
  app.add_option("--max-concurrency", flags.max_concurrency, "requests under way at once (default: no limit)")
      ->check(CLI::Range(1, 1 << 16))
      ->type_name("N");
  app.add_option("--num-warmups", flags.num_warmups, "of the first prompt, before the clock starts")
      ->check(CLI::Range(0, 1 << 16))
      ->capture_default_str();
  app.add_flag("--disable-tqdm", flags.disable_progress, "no line of progress");
  app.add_flag("--ignore-eos", flags.body.ignore_eos, "ask for the whole output length; always so with random");
  for (const char* name : {"temperature", "top-p", "top-k", "min-p", "frequency-penalty", "presence-penalty",
                           "repetition-penalty", "logprobs"}) {
    texts.sampling.emplace_back(name, std::make_shared<double>(0));
    app.add_option(std::string("--") + name, *texts.sampling.back().second, "sent with each request when given");
  }
  app.add_option("--extra-body", texts.extra_body, "further fields of each request")->type_name("JSON");
}

void AddReport(CLI::App& app, ServeFlags& flags, Texts& texts) {
  app.add_option("--percentile-metrics", texts.percentile_metrics,
                 "of ttft, tpot, itl, e2el, client_queue_time, e2el_including_client_queue")
      ->capture_default_str();
  app.add_option("--metric-percentiles", texts.metric_percentiles)->type_name("P,P,...")->capture_default_str();
  app.add_option("--goodput", texts.goodput, "what makes a request good: ttft, tpot, e2el, each with milliseconds")
      ->type_name("METRIC:MS");
  app.add_flag("--save-result", flags.save_result, "write the result as JSON");
  app.add_flag("--append-result", flags.append_result, "the same, at the end of the file");
  app.add_flag("--save-detailed", flags.stats.detailed, "with the times and texts of each request");
  app.add_option("--result-dir", flags.result_dir, "where (default: here)")->type_name("DIR");
  app.add_option("--result-filename", flags.result_filename, "default LABEL-RATEqps[-concurrencyN]-MODEL-DATE.json")
      ->type_name("FILE");
  app.add_option("--label", flags.label, "of the result (default: the backend)");
  app.add_option("--metadata", texts.metadata, "further fields of the result")->type_name("KEY=VALUE");
}

}  // namespace

void AddServeFlags(CLI::App& app, ServeFlags& flags) {
  const auto texts = std::make_shared<Texts>();
  texts->app = &app;
  AddTarget(app, flags, *texts);
  AddDataset(app, flags, *texts);
  AddLoad(app, flags, *texts);
  AddReport(app, flags, *texts);
  app.parse_complete_callback([texts, &flags] { FinishFlags(*texts, flags); });
}

}  // namespace jointkv::cli
