#include "cli/sampling_options.h"

#include <charconv>
#include <string>
#include <vector>

#include "cli/seed_option.h"

namespace jointkv::cli {
namespace {

void AddLogitBias(engine::SamplingParams& params, const std::string& text) {
  const char* end = text.data() + text.size();
  TokenId token = 0;
  float value = 0;
  const auto id = std::from_chars(text.data(), end, token);
  if (id.ec == std::errc() && id.ptr != end && *id.ptr == ':') {
    const auto bias = std::from_chars(id.ptr + 1, end, value);
    if (bias.ec == std::errc() && bias.ptr == end) {
      params.logit_bias.emplace_back(token, value);
      return;
    }
  }
  throw CLI::ValidationError("--logit-bias", "'" + text + "' is not of the form ID:VALUE, such as 198:-5");
}

}  // namespace

// Ranges are engine::Validate's business; here only the form is checked.
void AddSamplingFlags(CLI::App& app, engine::SamplingParams& params, bool per_choice) {
  const auto number = [&app](const char* flag, auto& value, const char* help) {
    app.add_option(flag, value, help)->capture_default_str();
  };
  number("--max-tokens", params.max_tokens, "output tokens at most");
  number("--min-tokens", params.min_tokens, "stop tokens cannot be drawn before");
  number("--temperature", params.temperature, "0: greedy");
  number("--top-k", params.top_k, "draw from the k likeliest; 0: off");
  number("--top-p", params.top_p, "draw from the likeliest that hold this mass; 1: off");
  number("--min-p", params.min_p, "least probability relative to the likeliest token's; 0: off");
  number("--repetition-penalty", params.repetition_penalty, "on every token seen; 1: off");
  number("--presence-penalty", params.presence_penalty, "once per distinct output token");
  number("--frequency-penalty", params.frequency_penalty, "per occurrence in the output");
  AddSeedFlag(app, params.seed, "of the random draws");
  app.add_option("--stop", params.stop, "text that ends the output; repeatable")
      ->allow_extra_args(false)
      ->type_name("TEXT");
  app.add_option("--stop-token", params.stop_tokens, "token id that ends the output; repeatable")
      ->allow_extra_args(false)
      ->type_name("ID");
  app.add_option_function<std::vector<std::string>>(
         "--logit-bias",
         [&params](const std::vector<std::string>& values) {
           for (const std::string& text : values) AddLogitBias(params, text);
         },
         "added to a token's logit; repeatable")
      ->allow_extra_args(false)
      ->type_name("ID:VALUE");
  app.add_flag("--ignore-eos", params.ignore_eos, "go on after the end-of-text token");
  if (!per_choice) return;
  app.add_option("--logprobs", params.logprobs, "log probabilities of each token and of the K likeliest")
      ->type_name("K")
      ->default_str("off");
  app.add_option("-n", params.n, "choices per prompt")->type_name("N")->capture_default_str();
}

}  // namespace jointkv::cli
