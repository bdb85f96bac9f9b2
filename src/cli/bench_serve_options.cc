#include "cli/bench_serve_options.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "cli/engine_options.h"
#include "cli/help_groups.h"
#include "cli/seed_option.h"

namespace jointkv::cli {
namespace {

using Json = nlohmann::ordered_json;

// As they were typed; FinishFlags reads them.
struct Texts {
  std::string percentile_metrics;
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
  bool insecure = false;
  std::string ramp_up_strategy;
  std::optional<double> ramp_up_start_rps;
  std::optional<double> ramp_up_end_rps;
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
  const char* usual = stats.embeddings ? "e2el" : "ttft,tpot,itl";
  stats.metrics = Split(texts.percentile_metrics.empty() ? usual : texts.percentile_metrics, ',');
  for (const std::string& metric : stats.metrics) {
    if (FindServeMetric(metric) == nullptr) {
      throw CLI::ValidationError("--percentile-metrics", "there is no metric '" + metric + "'");
    }
    if (stats.embeddings && (metric == "ttft" || metric == "tpot" || metric == "itl")) {
      throw CLI::ValidationError("--percentile-metrics", "embeddings have no " + metric);
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

// Fields that options of their own set, under OpenAI's names.
void AddSampling(const std::string& flag, double value, ServeFlags& flags) {
  std::string field = flag.substr(2);
  std::ranges::replace(field, '-', '_');
  if (field != "top_k" && field != "logprobs") {
    flags.body.extra[field] = value;
    return;
  }
  if (!(std::abs(value) <= 1e9 && value == std::floor(value))) {
    throw CLI::ValidationError(flag, "is not a whole number");
  }
  const auto whole = static_cast<int64_t>(value);
  if (field == "logprobs" && flags.body.api == ServeApi::kChat) {
    flags.body.extra["logprobs"] = true;
    flags.body.extra["top_logprobs"] = whole;
  } else {
    flags.body.extra[field] = whole;
  }
}

void FinishBody(const Texts& texts, ServeFlags& flags) {
  const char* endpoint = "/v1/completions";
  if (flags.backend == "openai-chat") {
    flags.body.api = ServeApi::kChat;
    endpoint = "/v1/chat/completions";
  } else if (flags.backend == "openai-embeddings") {
    flags.body.api = ServeApi::kEmbeddings;
    flags.stats.embeddings = true;
    endpoint = "/v1/embeddings";
  }
  if (flags.endpoint.empty()) flags.endpoint = endpoint;
  if (!flags.endpoint.starts_with('/')) throw CLI::ValidationError("--endpoint", "must start with /");
  if (!texts.served_model_name.empty()) flags.body.model = texts.served_model_name;
  std::vector<std::string> of_outputs = {"--ignore-eos", "--goodput", "--output-len"};
  for (const auto& [flag, value] : texts.sampling) {
    of_outputs.push_back(flag);
    if (texts.app->count(flag) > 0) AddSampling(flag, *value, flags);
  }
  for (const std::string& flag : of_outputs) {
    if (flags.stats.embeddings && texts.app->count(flag) > 0) {
      throw CLI::ValidationError(flag, "embeddings have no output tokens");
    }
  }
  flags.body.ignore_eos = !flags.stats.embeddings && (flags.body.ignore_eos || flags.dataset.name == "random");
  if (texts.extra_body.empty()) return;
  const Json extra = Json::parse(texts.extra_body, nullptr, false);
  if (!extra.is_object()) throw CLI::ValidationError("--extra-body", "is not a JSON object");
  flags.body.extra.update(extra);
}

bool HasControlCharacter(const std::string& text) {
  return std::ranges::any_of(text, [](char c) { return static_cast<unsigned char>(c) < ' '; });
}

void FinishHeaders(const Texts& texts, HttpHeaders& headers) {
  headers.clear();
  if (const char* key = std::getenv("OPENAI_API_KEY"); key != nullptr && *key != 0) {
    headers.emplace_back("Authorization", std::string("Bearer ") + key);
  }
  for (const std::string& header : texts.headers) {
    headers.push_back(KeyAndValue("--header", header, '='));
    if (HasControlCharacter(header)) throw CLI::ValidationError("--header", "has a control character");
  }
}

void FinishRampUp(const Texts& texts, ArrivalOptions& arrival) {
  const bool has_rate = texts.ramp_up_start_rps || texts.ramp_up_end_rps;
  if (texts.ramp_up_strategy.empty()) {
    if (has_rate) throw CLI::ValidationError("--ramp-up-strategy", "is missing beside the rates of a ramp");
    return;
  }
  if (!std::isinf(arrival.request_rate)) throw CLI::ValidationError("--request-rate", "not with --ramp-up-strategy");
  if (!texts.ramp_up_start_rps || !texts.ramp_up_end_rps) {
    throw CLI::ValidationError("--ramp-up-strategy", "needs --ramp-up-start-rps and --ramp-up-end-rps");
  }
  const RampUp ramp_up = {.exponential = texts.ramp_up_strategy == "exponential",
                          .start_rps = *texts.ramp_up_start_rps,
                          .end_rps = *texts.ramp_up_end_rps};
  if (ramp_up.start_rps > ramp_up.end_rps) {
    throw CLI::ValidationError("--ramp-up-start-rps", "is more than --ramp-up-end-rps");
  }
  arrival.ramp_up = ramp_up;
}

// As vLLM's "bench-" and eight hexadecimal digits.
std::string RandomPrefix() {
  std::random_device random;
  char text[32];
  std::snprintf(text, sizeof(text), "bench-%08x-", static_cast<unsigned>(random()));
  return text;
}

void FinishFlags(const Texts& texts, ServeFlags& flags) {
  if (!(flags.arrival.request_rate > 0)) throw CLI::ValidationError("--request-rate", "must be more than 0, or inf");
  if (!(flags.arrival.burstiness > 0)) throw CLI::ValidationError("--burstiness", "must be more than 0");
  FinishRampUp(texts, flags.arrival);
  flags.arrival.seed = flags.dataset.seed;
  flags.tls_check = texts.insecure ? TlsCheck::kNone : TlsCheck::kCertificate;
  if (texts.app->count("--request-id-prefix") == 0) flags.request_id_prefix = RandomPrefix();
  if (HasControlCharacter(flags.request_id_prefix)) {
    throw CLI::ValidationError("--request-id-prefix", "has a control character");
  }
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
  FinishBody(texts, flags);
  FinishStats(texts, flags.stats);
  FinishHeaders(texts, flags.headers);
  flags.metadata.clear();
  for (const std::string& item : texts.metadata) flags.metadata.push_back(KeyAndValue("--metadata", item, '='));
  if (flags.save_result || flags.append_result) return;
  for (const char* flag : {"--save-detailed", "--result-dir", "--result-filename", "--label", "--metadata"}) {
    if (texts.app->count(flag) > 0) flags.ignored.emplace_back(flag);
  }
}

void AddTarget(CLI::App& app, ServeFlags& flags, Texts& texts) {
  SetGroup(app, "Server");
  app.add_option("--backend", flags.backend,
                 "openai, vllm: /v1/completions with plain text; openai-chat: messages; openai-embeddings: the text")
      ->check(CLI::IsMember({"openai", "vllm", "openai-chat", "openai-embeddings"}).description(""))
      ->type_name("openai|vllm|openai-chat|openai-embeddings")
      ->capture_default_str();
  app.add_option("--base-url", flags.base_url, "in place of host and port; http or https")
      ->type_name("http://HOST:PORT");
  app.add_flag("--insecure", texts.insecure, "https: take any certificate, not only those that the system trusts");
  app.add_option("--host", flags.host)->capture_default_str();
  app.add_option("--port", flags.port)->check(CLI::Range(1, 65535))->capture_default_str();
  app.add_option("--endpoint", flags.endpoint, "default by backend")->type_name("PATH");
  app.add_option("--header", texts.headers, "further headers of each request; OPENAI_API_KEY is sent as the bearer")
      ->type_name("KEY=VALUE");
  app.add_option("--request-id-prefix", flags.request_id_prefix, "of the X-Request-Id of each request")
      ->default_str("bench-, 8 random digits, -");
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
  SetGroup(app, "Requests");
  std::string names;
  for (const std::string& name : DatasetNames()) names += (names.empty() ? "" : "|") + name;
  app.add_option("--dataset-name", dataset.name, "what is asked")
      ->check(CLI::IsMember(DatasetNames()).description(""))
      ->type_name(names)
      ->capture_default_str();
  app.add_option("--dataset-path,--docs", dataset.path,
                 "custom: rows with prompt or messages; rag-pool and the like: real documents, as for `eval`")
      ->type_name("FILE.jsonl");
  number("--num-prompts", dataset.num_prompts, 1, 1 << 20, "requests")->capture_default_str();
  AddSeedFlag(app, dataset.seed, "of the prompts and of their arrival");
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
  SetGroup(app, "Load");
  app.add_option("--request-rate", flags.arrival.request_rate, "requests a second; inf: all at once")
      ->capture_default_str();
  app.add_option("--burstiness", flags.arrival.burstiness,
                 "shape of the gamma distributed gaps; 1: Poisson, less: bursts, more: even, inf: equal")
      ->capture_default_str();
  app.add_option("--ramp-up-strategy", texts.ramp_up_strategy, "in place of a rate: one that rises over the requests")
      ->check(CLI::IsMember({"linear", "exponential"}).description(""))
      ->type_name("linear|exponential");
  app.add_option("--ramp-up-start-rps", texts.ramp_up_start_rps, "requests a second at the first request")
      ->check(CLI::Range(1e-6, 1e6))
      ->type_name("N");
  app.add_option("--ramp-up-end-rps", texts.ramp_up_end_rps, "at the last one")
      ->check(CLI::Range(1e-6, 1e6))
      ->type_name("N");
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
    texts.sampling.emplace_back(std::string("--") + name, std::make_shared<double>(0));
    app.add_option(texts.sampling.back().first, *texts.sampling.back().second, "sent with each request when given")
        ->type_name("N");
  }
  app.add_option("--extra-body", texts.extra_body, "further fields of each request")->type_name("JSON");
}

void AddReport(CLI::App& app, ServeFlags& flags, Texts& texts) {
  SetGroup(app, "Result");
  app.add_option("--percentile-metrics", texts.percentile_metrics,
                 "of ttft, tpot, itl, e2el, client_queue_time, e2el_including_client_queue")
      ->type_name("NAME,NAME,...")
      ->default_str("ttft,tpot,itl; e2el for embeddings");
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
  PutHelpLast(app);
  app.parse_complete_callback([texts, &flags] { FinishFlags(*texts, flags); });
}

}  // namespace jointkv::cli
