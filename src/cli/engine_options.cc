#include "cli/engine_options.h"

#include <spdlog/fmt/fmt.h>

#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <utility>

#include "base/bytes.h"
#include "base/cpu.h"
#include "cli/terminal.h"
#include "dense/gemm_int8.h"

namespace jointkv::cli {
namespace {

constexpr const char* kDefaultModel = "SmolLM2-135M-Instruct.Q4_1.gguf";

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// An option whose value is one of a few words, each standing for a value of `target`.
template <typename T>
void AddChoice(CLI::App& app, const std::string& flag, T& target,
               std::initializer_list<std::pair<const char*, T>> words, const std::string& shown_default,
               const std::string& help) {
  std::string names;
  for (const auto& [word, value] : words) names += (names.empty() ? "" : "|") + std::string(word);
  const auto choose = [&target, flag, names,
                       known = std::vector<std::pair<const char*, T>>(words)](const std::string& text) {
    for (const auto& [word, value] : known) {
      if (text == word) {
        target = value;
        return;
      }
    }
    throw CLI::ValidationError(flag, "'" + text + "' is not one of " + names);
  };
  app.add_option_function<std::string>(flag, choose, help)->type_name(names)->default_str(shown_default);
}

}  // namespace

std::string DefaultModelPath() {
  const std::string model = Environment("JOINTKV_MODEL");
  if (!model.empty()) return model;
  std::string cache = Environment("JOINTKV_CACHE");
  if (cache.empty()) cache = Environment("HOME") + "/.cache/jointkv";
  return cache + "/models/" + kDefaultModel;
}

Status CheckModelFile(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return {StatusCode::kInvalidArgument, "'" + path + "' is a directory, not a model file"};
  }
  if (std::filesystem::exists(path, error)) return Status::Ok();
  return {StatusCode::kNotFound, "there is no model file '" + path +
                                     "': run `make setup`, which fetches the default one, or name another with -m or "
                                     "JOINTKV_MODEL"};
}

void AddFusionScopeFlags(CLI::App& app, joint::FusionOptions& fusion) {
  app.add_flag("--similarity", fusion.similarity,
               "bounded: also try blocks with other tokens, found by the likeness of their values");
  app.add_option_function<std::string>(
         "--kv-residuals", [&fusion](const std::string& text) { fusion.residuals = text == "on"; },
         "bounded: keep blocks beyond the budget as what they differ by from a representative, in 1, 2 or 4 bits")
      ->check(CLI::IsMember({"on", "off"}).description(""))
      ->type_name("on|off")
      ->default_str("off");
  const auto choose = [&fusion](const std::string& text) {
    fusion.across_requests = text != "cff";
    fusion.across_chunks = text != "bff";
  };
  app.add_option_function<std::string>("--cosine-scope", choose,
                                       "cosine: fuse blocks of different requests (bff), of one prompt (cff), or both")
      ->check(CLI::IsMember({"bff", "cff", "both"}).description(""))
      ->type_name("bff|cff|both")
      ->default_str("both");
}

namespace {

void AddKvType(CLI::App& app, std::vector<engine::KvTypeRule>& rules) {
  const auto add = [&rules](const std::vector<std::string>& texts) {
    rules.clear();
    for (const std::string& text : texts) {
      const Expected<engine::KvTypeRule> rule = engine::ParseKvTypeRule(text);
      if (!rule.ok()) throw CLI::ValidationError("--kv-type", rule.status().message());
      rules.push_back(*rule);
    }
  };
  app.add_option_function<std::vector<std::string>>("--kv-type", add,
                                                    "how keys and values are stored: bf16, f16, f32, or q8 and q4 once "
                                                    "sealed; may be given again for some layers, "
                                                    "as 0-3:q8,q4")
      ->type_name("K[,V]")
      ->expected(1)
      ->take_all()
      ->default_str("bf16, f32 for an f32 model");
}

}  // namespace

void AddEngineFlags(CLI::App& app, engine::EngineOptions& options) {
  using joint::Policy;
  AddEngineFlagsButKv(app, options);
  AddKvType(app, options.kv_type);
  AddChoice<Policy>(app, "--kv-fusion", options.fusion.policy,
                    {{"off", Policy::kOff}, {"bounded", Policy::kBounded}, {"cosine", Policy::kCosine}},
                    joint::PolicyName(options.fusion.policy),
                    "which KV blocks are stored once. off: equal prefixes only; bounded: equal text within an error "
                    "budget; cosine: keys that point alike (arXiv 2601.03067), no bound on the error");
  const auto share = [&app](const char* flag, float& value, const char* help) {
    app.add_option(flag, value, help)
        ->check(CLI::Range(1e-6F, 1.0F))
        ->type_name("0..1")
        ->default_str(fmt::format("{}", value));
  };
  share("--kv-budget", options.fusion.budget,
        "bounded: largest squared error of a block's K or V, relative to their energy");
  share("--kv-threshold", options.fusion.threshold, "cosine: least cosine of two key blocks");
  AddFusionScopeFlags(app, options.fusion);
  app.parse_complete_callback([&app, &options] {
    if (!options.deterministic || app.count("--kv-fusion") == 0 || options.fusion.policy == Policy::kOff) return;
    throw CLI::ValidationError("--deterministic",
                               "only with --kv-fusion off, for what a block is fused with depends on what else runs");
  });
}

void AddModelFlags(CLI::App& app, engine::EngineOptions& options) {
  options.model_path = DefaultModelPath();
  app.add_option("-m,--model", options.model_path, "GGUF model file")->type_name("MODEL")->capture_default_str();
  app.add_option("--threads", options.threads, "compute threads; 0: one per core")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
  const auto parse_size = [&options](const std::string& text) {
    const Expected<size_t> bytes = ParseBytes(text);
    if (!bytes.ok()) throw CLI::ValidationError("--kv-bytes", bytes.status().message());
    if (*bytes == 0) throw CLI::ValidationError("--kv-bytes", "must be more than 0");
    options.kv_bytes = *bytes;
  };
  app.add_option_function<std::string>("--kv-bytes", parse_size, "cap of the KV arena: 512M, 2G")
      ->type_name("SIZE")
      ->default_str(options.kv_bytes == 0 ? "1/3 of free memory" : FormatBytes(options.kv_bytes));
}

void AddEngineFlagsButKv(CLI::App& app, engine::EngineOptions& options) {
  using dense::Precision;
  using dense::WeightsMemory;
  AddModelFlags(app, options);
  app.add_option("--max-running", options.max_running, "sequences computed at once")
      ->check(CLI::Range(1, 4096))
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--step-tokens", options.step_tokens, "token budget of one step")
      ->check(CLI::Range(1, 16384))
      ->type_name("N")
      ->capture_default_str();
  app.add_option("--max-context", options.max_context, "tokens of one sequence; 0: what the model was trained for")
      ->check(CLI::NonNegativeNumber)
      ->type_name("N")
      ->capture_default_str();
  AddChoice<WeightsMemory>(app, "--weights-memory", options.weights_memory,
                           {{"packed", WeightsMemory::kPacked}, {"lean", WeightsMemory::kLean}}, "packed",
                           "packed: weights unpacked once, faster; lean: the file's own, smaller");
  AddChoice<std::optional<Precision>>(
      app, "--compute", options.precision,
      {{"auto", std::nullopt}, {"int8", Precision::kInt8}, {"bf16", Precision::kBf16}, {"f32", Precision::kF32}},
      "auto",
      "precision of matrix products; auto: by the file and the CPU; int8: of quantised weights, others in bf16 or f32");
  app.add_option(
         "--quantised-rows", options.quantised_rows,
         "steps of at most N rows use the file's quantised weights directly; ignored with --deterministic, or when "
         "a matrix has no ggml dot product")
      ->check(CLI::Range(0, 16384))
      ->type_name("N")
      ->default_str("measured at load");
  app.add_flag("--deterministic", options.deterministic, "results never depend on the rest of the batch; slower");
  app.add_flag_callback(
      "--no-prefix-cache", [&options] { options.prefix_cache = false; }, "do not share equal prefixes of prompts");
}

std::function<void(int done, int total)> LoadProgress(ProgressLine& line) {
  return [&line](int done, int total) {
    if (!line.due() || total <= 0) return;
    constexpr int kWidth = 30;
    const int filled = done * kWidth / total;
    line.Show(fmt::format("loading [{:<{}}] {}/{} layers", std::string(filled, '#'), kWidth, done, total));
  };
}

Status CheckEngineOptions(const engine::EngineOptions& options) {
  RETURN_IF_ERROR(CheckModelFile(options.model_path));
  if (options.precision == dense::Precision::kInt8 && !dense::HasInt8Products()) {
    return {StatusCode::kUnsupported, "--compute int8: this CPU has no AVX2, or JOINTKV_TARGET leaves it out"};
  }
  if (options.precision == dense::Precision::kBf16 && !HasAvx512Bf16()) {
    return {StatusCode::kUnsupported, "--compute bf16: this CPU has no AVX-512 BF16, or JOINTKV_TARGET leaves it out"};
  }
  return Status::Ok();
}

std::unique_ptr<engine::Engine> LoadEngine(engine::EngineOptions options, int& exit_code) {
  if (const Status status = CheckEngineOptions(options); !status.ok()) {
    Complain(status.message());
    exit_code = kExitUsage;
    return nullptr;
  }
  ProgressLine line;
  options.load_progress = LoadProgress(line);
  Expected<std::unique_ptr<engine::Engine>> engine = engine::Engine::Create(options);
  if (!engine.ok()) {
    Complain(engine.status().message());
    exit_code = kExitFailed;
    return nullptr;
  }
  return std::move(engine).value();
}

}  // namespace jointkv::cli
