#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/model_size.h"
#include "cli/summary.h"
#include "cli/terminal.h"
#include "ggml.h"
#include "gguf/gguf_file.h"
#include "gguf/hyperparameters.h"
#include "models/model.h"
#include "text/detokenizer.h"

namespace jointkv::cli {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr std::array kCodecs = {codec::Codec::kBf16, codec::Codec::kF16, codec::Codec::kF32, codec::Codec::kQ8,
                                codec::Codec::kQ4};

OrderedJson HyperparametersJson(const gguf::Hyperparameters& hp) {
  const auto rope = [](const gguf::Rope& r) {
    return OrderedJson{{"n_rot", r.n_rot},
                       {"neox", r.neox},
                       {"freq_base", r.freq_base},
                       {"freq_scale", r.freq_scale},
                       {"ext_factor", r.ext_factor}};
  };
  OrderedJson json = {{"architecture", gguf::ArchitectureName(hp.architecture)},
                      {"name", text::SanitizeUtf8(hp.name)},
                      {"n_layers", hp.n_layers},
                      {"d_model", hp.d_model},
                      {"n_heads", hp.n_heads},
                      {"n_kv_heads", hp.n_kv_heads},
                      {"head_dim", hp.head_dim},
                      {"d_ff", hp.d_ff},
                      {"n_vocab", hp.n_vocab},
                      {"context_length", hp.context_length},
                      {"rms_eps", hp.rms_eps},
                      {"rope_scaling", gguf::RopeScalingName(hp.rope_scaling)},
                      {"rope_scaling_factor", hp.rope_scaling_factor},
                      {"rope_freq_factors", hp.rope_freq_factors.size()},
                      {"rope", rope(hp.rope)},
                      {"sliding_window", hp.sliding_window},
                      {"sliding_window_layers", std::ranges::count(hp.is_swa_layer, true)},
                      {"attention_scale", hp.attention_scale},
                      {"final_logit_softcap", hp.final_logit_softcap},
                      {"embedding_scale", hp.embedding_scale}};
  if (hp.sliding_window > 0) json["rope_sliding_window"] = rope(hp.rope_swa);
  return json;
}

OrderedJson TensorsJson(const gguf::GgufFile& file) {
  OrderedJson tensors = OrderedJson::array();
  for (const gguf::Tensor& tensor : file.tensors()) {
    OrderedJson shape = OrderedJson::array();
    for (int i = 0; i < tensor.n_dims; ++i) shape.push_back(tensor.ne[static_cast<size_t>(i)]);
    tensors.push_back({{"name", text::SanitizeUtf8(tensor.name)},
                       {"type", ggml_type_name(tensor.type)},
                       {"shape", std::move(shape)},
                       {"bytes", tensor.size_bytes}});
  }
  return tensors;
}

OrderedJson TypesJson(const gguf::GgufFile& file) {
  struct Count {
    int tensors = 0;
    size_t bytes = 0;
  };
  std::map<std::string, Count> counts;
  for (const gguf::Tensor& tensor : file.tensors()) {
    Count& count = counts[ggml_type_name(tensor.type)];
    ++count.tensors;
    count.bytes += tensor.size_bytes;
  }
  OrderedJson types = OrderedJson::object();
  for (const auto& [type, count] : counts) types[type] = {{"tensors", count.tensors}, {"bytes", count.bytes}};
  return types;
}

OrderedJson KvJson(const gguf::Hyperparameters& hp, size_t arena_bytes) {
  OrderedJson kv = OrderedJson::object();
  for (const codec::Codec codec : kCodecs) {
    const size_t token_bytes = KvTokenBytes(hp, codec);
    const size_t sequence_bytes = KvSequenceBytes(hp, codec, hp.context_length);
    kv[codec::CodecName(codec)] = {{"bytes_per_token", token_bytes},
                                   {"tokens_per_gib", (size_t{1} << 30) / token_bytes},
                                   {"tokens_in_arena", arena_bytes / token_bytes},
                                   {"full_context_bytes", sequence_bytes},
                                   {"full_contexts_in_arena", arena_bytes / sequence_bytes}};
  }
  return kv;
}

OrderedJson InspectFile(const gguf::GgufFile& file, const gguf::Hyperparameters& hp) {
  const dense::Precision precision = models::AutoPrecision(file);
  const MatrixSize matrices = MatricesOf(file, precision);
  const size_t arena_bytes = AvailableMemoryBytes() / 3;
  return {{"path", text::SanitizeUtf8(file.path())},
          {"file_bytes", file.file_bytes()},
          {"gguf_version", file.version()},
          {"quantization", file.quantization()},
          {"hyperparameters", HyperparametersJson(hp)},
          {"types", TypesJson(file)},
          {"memory",
           {{"compute", dense::PrecisionName(precision)},
            {"matrix_elements", matrices.elements},
            {"packed_bytes", file.file_bytes() + matrices.packed_bytes},
            {"lean_bytes", file.file_bytes()}}},
          {"default_arena_bytes", arena_bytes},
          {"kv", KvJson(hp, arena_bytes)},
          {"tensors", TensorsJson(file)}};
}

std::string Scalar(const OrderedJson& value) { return value.is_string() ? value.get<std::string>() : value.dump(); }

void PrintTables(const OrderedJson& json) {
  const auto bytes = [](const OrderedJson& value) { return FormatBytes(value.get<size_t>()); };
  fmt::print("{}\nGGUF version {}, {}, mostly {}\n\n", Scalar(json["path"]), json["gguf_version"].dump(),
             bytes(json["file_bytes"]), Scalar(json["quantization"]));
  for (const auto& [key, value] : json["hyperparameters"].items()) fmt::print("{:<24}{}\n", key, Scalar(value));

  fmt::print("\n{:<40}{:>8}{:>22}{:>14}\n", "tensor", "type", "shape", "bytes");
  for (const OrderedJson& tensor : json["tensors"]) {
    std::string shape;
    for (const OrderedJson& size : tensor["shape"]) shape += (shape.empty() ? "" : " x ") + size.dump();
    fmt::print("{:<40}{:>8}{:>22}{:>14}\n", Scalar(tensor["name"]), Scalar(tensor["type"]), shape,
               tensor["bytes"].dump());
  }
  fmt::print("\n");
  for (const auto& [type, count] : json["types"].items()) {
    fmt::print("{:<8}{:>5} tensors, {}\n", type, count["tensors"].dump(), bytes(count["bytes"]));
  }

  const OrderedJson& memory = json["memory"];
  fmt::print("\nweights in memory, computing in {}: {} packed, {} lean, the mapped file of {} included\n",
             Scalar(memory["compute"]), bytes(memory["packed_bytes"]), bytes(memory["lean_bytes"]),
             bytes(json["file_bytes"]));
  fmt::print("KV arena by default (1/3 of free memory): {}\n", bytes(json["default_arena_bytes"]));
  fmt::print("\n{:<8}{:>16}{:>16}{:>18}{:>14}{:>24}\n", "KV type", "bytes a token", "tokens a GiB", "tokens in arena",
             "full context", "full contexts in arena");
  for (const auto& [codec, kv] : json["kv"].items()) {
    fmt::print("{:<8}{:>16}{:>16}{:>18}{:>14}{:>24}\n", codec, kv["bytes_per_token"].dump(),
               kv["tokens_per_gib"].dump(), kv["tokens_in_arena"].dump(), bytes(kv["full_context_bytes"]),
               kv["full_contexts_in_arena"].dump());
  }
}

int RunInspect(const std::string& path, bool as_json) {
  if (const Status status = CheckModelFile(path); !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  const Expected<gguf::GgufFile> file = gguf::GgufFile::Open(path);
  if (!file.ok()) {
    Complain(file.status().message());
    return kExitFailed;
  }
  const Expected<gguf::Hyperparameters> hp = gguf::ReadHyperparameters(*file);
  if (!hp.ok()) {
    Complain(hp.status().message());
    return kExitFailed;
  }
  const OrderedJson json = InspectFile(*file, *hp);
  if (as_json) {
    fmt::print("{}\n", json.dump(2));
  } else {
    PrintTables(json);
  }
  return kExitOk;
}

}  // namespace

void AddInspect(CLI::App& app, Command& run) {
  struct Flags {
    std::string path = DefaultModelPath();
    bool json = false;
  };
  const auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("inspect", "a model's sizes, tensors, KV bytes per token and what fits");
  command->add_option("MODEL,-m,--model", flags->path, "GGUF model file")->type_name("FILE")->capture_default_str();
  command->add_flag("--json", flags->json, "as JSON");
  command->callback([&run, flags] { run = [flags] { return RunInspect(flags->path, flags->json); }; });
}

}  // namespace jointkv::cli
