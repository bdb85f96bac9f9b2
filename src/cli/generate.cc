#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

#include "cli/batch.h"
#include "cli/chat_template_option.h"
#include "cli/commands.h"
#include "cli/engine_options.h"
#include "cli/help_groups.h"
#include "cli/output_files.h"
#include "cli/prompts.h"
#include "cli/sampling_options.h"
#include "cli/terminal.h"
#include "text/detokenizer.h"

namespace jointkv::cli {
namespace {

using engine::FinishReason;
using OrderedJson = nlohmann::ordered_json;

struct GenerateFlags {
  engine::EngineOptions engine;
  engine::SamplingParams sampling;
  std::string prompt;
  std::string prompts_path;
  bool has_prompt = false;
  bool chat = false;
  std::string system;
  std::string chat_template;  // text; empty: the model file's
  std::string chat_template_path;
  std::string json_path;
  std::string summary_path;
  bool quiet = false;
};

// A prompt, or why there is none, and where it came from.
struct Input {
  std::string where;  // "prompts.jsonl:3"
  Expected<Prompt> prompt;
};

// What stays of an Input once it is queued.
struct Source {
  std::string where;
  std::string id;
  engine::SamplingParams sampling;
};

class Generate {
 public:
  explicit Generate(const GenerateFlags& flags) : flags_(flags) {}
  int Run();

 private:
  Status ReadInput();
  Status OpenOutput();
  bool UsesTemplate(const Prompt& prompt) const;
  void Take(Input& input);
  Expected<engine::Request> RequestOf(Prompt& prompt) const;
  Status Submit(size_t index, Prompt& prompt);
  void Refuse(const std::string& where, const std::string& id, size_t index, const Status& status);
  void OnText(const std::string& text);
  void OnEnd(const Choice& choice);
  OrderedJson ChoiceRow(const Choice& choice) const;
  OrderedJson Logprobs(const Choice& choice) const;
  void WriteRow(const OrderedJson& row);
  int Finish();

  const GenerateFlags& flags_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<text::ChatTemplate> chat_template_;
  std::unique_ptr<Batch> batch_;
  std::vector<Input> inputs_;
  std::vector<Source> sources_;
  std::FILE* json_ = nullptr;
  bool stream_ = false;  // the one choice there is goes to stdout as it comes
  bool failed_ = false;
};

// All prompts, before anything is written: what is wrong with the file shows at once.
Status Generate::ReadInput() {
  if (flags_.has_prompt) {
    inputs_.push_back({"--prompt", Prompt{.id = {}, .content = flags_.prompt, .sampling = flags_.sampling}});
    return Status::Ok();
  }
  const auto take = [this](int line, Expected<Prompt> prompt) {
    inputs_.push_back({flags_.prompts_path + ":" + std::to_string(line), std::move(prompt)});
  };
  const Status status = ReadPrompts(flags_.prompts_path, flags_.sampling, take);
  if (!status.ok()) return {status.code(), "--prompts " + status.message()};
  if (inputs_.empty()) return {StatusCode::kInvalidArgument, "--prompts '" + flags_.prompts_path + "': has no prompts"};
  return Status::Ok();
}

Status Generate::OpenOutput() {
  if (flags_.json_path.empty()) return Status::Ok();
  json_ = flags_.json_path == "-" ? stdout : std::fopen(flags_.json_path.c_str(), "w");
  if (json_ != nullptr) return Status::Ok();
  return {StatusCode::kIo, "--json '" + flags_.json_path + "': " + std::strerror(errno)};
}

bool Generate::UsesTemplate(const Prompt& prompt) const {
  return std::holds_alternative<Conversation>(prompt.content) ||
         (flags_.chat && std::holds_alternative<std::string>(prompt.content));
}

int Generate::Run() {
  if (const Status status = Validate(flags_.sampling, std::numeric_limits<int>::max(), flags_.engine.sampling_limits);
      !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  const Status outputs = CheckOutputs({{"--prompts", flags_.prompts_path},
                                       {"--model", flags_.engine.model_path},
                                       {"--chat-template", flags_.chat_template_path}},
                                      {{"--json", flags_.json_path}, {"--summary", flags_.summary_path}});
  if (!outputs.ok()) {
    Complain(outputs.message());
    return kExitUsage;
  }
  if (const Status status = ReadInput(); !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  int exit_code = kExitOk;
  engine_ = LoadEngine(flags_.engine, exit_code);
  if (engine_ == nullptr) return exit_code;
  Expected<std::unique_ptr<text::ChatTemplate>> chat_template =
      text::ChatTemplate::CreateAsGiven(engine_->tokenizer(), flags_.chat_template);
  if (!chat_template.ok()) {
    Complain(chat_template.status().message());
    return kExitFailed;
  }
  chat_template_ = std::move(chat_template).value();
  const auto uses_template = [this](const Input& input) { return input.prompt.ok() && UsesTemplate(*input.prompt); };
  if (!chat_template_->warning().empty() && std::ranges::any_of(inputs_, uses_template)) {
    Complain(chat_template_->warning());
  }
  if (const Status status = OpenOutput(); !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  stream_ = flags_.has_prompt && flags_.sampling.n == 1 && json_ != stdout;
  batch_ = std::make_unique<Batch>(*engine_);
  ArmInterrupt();
  for (Input& input : inputs_) Take(input);
  inputs_.clear();
  Batch::Observer observer;
  if (stream_) observer.on_text = [this](size_t, int, const std::string& text) { OnText(text); };
  observer.on_end = [this](const Choice& choice) { OnEnd(choice); };
  batch_->Run(observer);
  return Finish();
}

// Queues one prompt, or says why not.
void Generate::Take(Input& input) {
  const size_t index = sources_.size();
  sources_.push_back({input.where, {}, {}});
  Status status = input.prompt.status();
  if (input.prompt.ok()) {
    sources_[index].id = input.prompt->id;
    status = Submit(index, *input.prompt);
  }
  if (!status.ok()) Refuse(input.where, sources_[index].id, index, status);
}

Status Generate::Submit(size_t index, Prompt& prompt) {
  ASSIGN_OR_RETURN(engine::Request request, RequestOf(prompt));
  sources_[index].sampling = request.sampling;
  return batch_->Submit(index, std::move(request));
}

void Generate::Refuse(const std::string& where, const std::string& id, size_t index, const Status& status) {
  failed_ = true;
  Complain(where + ": " + status.message());
  OrderedJson row;
  if (!id.empty()) row["id"] = id;
  row["index"] = index;
  row["error"] = status.message();
  WriteRow(row);
}

Expected<engine::Request> Generate::RequestOf(Prompt& prompt) const {
  engine::Request request;
  request.sampling = std::move(prompt.sampling);
  request.kv_fusion = prompt.kv_fusion;
  if (auto* tokens = std::get_if<std::vector<TokenId>>(&prompt.content)) {
    request.prompt = std::move(*tokens);
    return request;
  }
  auto* text = std::get_if<std::string>(&prompt.content);
  if (text != nullptr && !flags_.chat) {
    ASSIGN_OR_RETURN(request.prompt, engine_->tokenizer().Encode(*text, true, true));
    return request;
  }
  Conversation conversation;
  if (text != nullptr) {
    conversation.messages.push_back({"user", std::move(*text)});
  } else {
    conversation = std::move(std::get<Conversation>(prompt.content));
  }
  if (!flags_.system.empty() && conversation.messages.front().role != "system") {
    conversation.messages.insert(conversation.messages.begin(), {"system", flags_.system});
  }
  text::ChatOptions options;
  options.parallel_tool_calls = conversation.parallel_tool_calls;
  ASSIGN_OR_RETURN(const text::ChatPrompt rendered,
                   chat_template_->Render(conversation.messages, conversation.tools, options));
  ASSIGN_OR_RETURN(request.prompt, chat_template_->EncodePrompt(rendered));
  request.sampling.stop.insert(request.sampling.stop.end(), rendered.stops.begin(), rendered.stops.end());
  return request;
}

void Generate::OnText(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void Generate::OnEnd(const Choice& choice) {
  const Source& source = sources_[choice.request];
  if (choice.end.finish == FinishReason::kError) Complain(source.where + ": " + choice.end.error.message());
  if (json_ != nullptr) WriteRow(ChoiceRow(choice));
  if (stream_) {
    OnText("\n");
  } else if (json_ == nullptr && !flags_.quiet) {
    const std::string name = source.id.empty() ? std::to_string(choice.request) : source.id;
    const std::string number = source.sampling.n > 1 ? " choice " + std::to_string(choice.end.choice) : "";
    OnText("== " + name + number + " (" + FinishReasonName(choice.end.finish) + ")\n" + choice.text + "\n");
  }
}

OrderedJson Generate::ChoiceRow(const Choice& choice) const {
  const Source& source = sources_[choice.request];
  const engine::Event& end = choice.end;
  OrderedJson row;
  if (!source.id.empty()) row["id"] = source.id;
  row["index"] = choice.request;
  row["choice"] = end.choice;
  row["text"] = choice.text;
  row["tokens"] = choice.tokens;
  row["finish_reason"] = FinishReasonName(end.finish);
  row["usage"] = {
      {"prompt_tokens", end.prompt_tokens}, {"output_tokens", end.output_tokens}, {"cached_tokens", end.cached_tokens}};
  row["timings"] = {{"queue_ms", QueueMs(end.times)},
                    {"ttft_ms", TtftMs(end.times)},
                    {"tpot_ms", TpotMs(end.times, end.output_tokens)}};
  if (source.sampling.logprobs >= 0) row["logprobs"] = Logprobs(choice);
  if (end.finish == FinishReason::kError) row["error"] = end.error.message();
  return row;
}

OrderedJson Generate::Logprobs(const Choice& choice) const {
  const auto entry = [this](TokenId token, float logprob) {
    const std::string text = text::SanitizeUtf8(engine_->tokenizer().Piece(token));
    return OrderedJson{{"token", token}, {"text", text}, {"logprob", logprob}};
  };
  OrderedJson rows = OrderedJson::array();
  for (size_t i = 0; i < choice.tokens.size(); ++i) {
    OrderedJson row = entry(choice.tokens[i], choice.logprobs[i].chosen);
    row["top"] = OrderedJson::array();
    for (const engine::TokenLogprob& top : choice.logprobs[i].top) row["top"].push_back(entry(top.token, top.logprob));
    rows.push_back(std::move(row));
  }
  return rows;
}

void Generate::WriteRow(const OrderedJson& row) {
  if (json_ == nullptr) return;
  const std::string line = row.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
  std::fwrite(line.data(), 1, line.size(), json_);
  std::fflush(json_);
}

int Generate::Finish() {
  if (json_ != nullptr) {
    const bool written = std::ferror(json_) == 0 && (json_ == stdout ? std::fflush(json_) : std::fclose(json_)) == 0;
    if (!written) {
      failed_ = true;
      Complain("--json '" + flags_.json_path + "': " + std::strerror(errno));
    }
  }
  const Summary summary = batch_->summary();
  if (!flags_.quiet) std::fprintf(stderr, "\n%s", ToTable(summary).c_str());
  if (!flags_.summary_path.empty()) {
    if (const Status status = WriteTextFile(flags_.summary_path, ToJson(summary).dump(2) + "\n"); !status.ok()) {
      failed_ = true;
      Complain("--summary " + status.message());
    }
  }
  if (Interrupted()) return kExitInterrupted;
  return failed_ || !batch_->all_ok() ? kExitFailed : kExitOk;
}

}  // namespace

void AddGenerate(CLI::App& app, Command& run) {
  const auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app.add_subcommand("generate", "run one prompt, or a file of prompts all at once");
  SetGroup(*command, "Prompts: --prompt or --prompts is required");
  CLI::Option* prompt = command->add_option("--prompt", flags->prompt, "text to continue")->option_text("TEXT");
  CLI::Option* prompts = command->add_option("--prompts", flags->prompts_path, "a request a line; - for standard input")
                             ->option_text("FILE.jsonl")
                             ->excludes(prompt);
  command->add_flag("--chat", flags->chat, "a text prompt is a user's message: apply the model's chat template");
  command
      ->add_option("--system", flags->system,
                   "system message of conversations that have none; only with --chat or messages")
      ->type_name("TEXT");
  SetGroup(*command, "Output");
  command->add_option("--json", flags->json_path, "write a row per choice; - for standard output")
      ->type_name("OUT.jsonl");
  command->add_option("--summary", flags->summary_path, "write the summary as JSON; - for standard output")
      ->type_name("FILE");
  command->add_flag("--quiet", flags->quiet, "no table, and no texts of many prompts");
  SetGroup(*command, "Sampling");
  AddSamplingFlags(*command, flags->sampling);
  SetGroup(*command, "Engine");
  AddChatTemplateFlag(*command, flags->chat_template, &flags->chat_template_path);
  AddEngineFlags(*command, flags->engine);
  PutHelpLast(*command);
  command->callback([&run, flags, prompt, prompts] {
    flags->has_prompt = prompt->count() > 0;
    if (!flags->has_prompt && prompts->count() == 0) throw CLI::RequiredError("--prompt or --prompts");
    run = [flags] { return Generate(*flags).Run(); };
  });
}

}  // namespace jointkv::cli
