// An engine driven to the end of its requests, with what came out sorted by choice, for the tests of this room.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/hash.h"
#include "engine/engine.h"
#include "engine/test_models.h"
#include "text/detokenizer.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define JOINTKV_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define JOINTKV_SANITIZED
#endif
#endif

namespace jointkv::engine {

using Tokens = std::vector<TokenId>;

inline std::string DefaultModelPath() {
  if (const char* model = std::getenv("JOINTKV_MODEL"); model != nullptr && *model != 0) return model;
  const char* cache = std::getenv("JOINTKV_CACHE");
  const char* home = std::getenv("HOME");
  const std::string root = cache != nullptr && *cache != 0 ? cache : std::string(home ? home : ".") + "/.cache/jointkv";
  return root + "/models/SmolLM2-135M-Instruct.Q4_1.gguf";
}

#define SKIP_WITHOUT_MODEL()                           \
  if (!std::filesystem::exists(DefaultModelPath())) {  \
    GTEST_SKIP() << "no model " << DefaultModelPath(); \
  }

inline EngineOptions TestOptions(const std::string& model = "llama") {
  EngineOptions options;
  options.model_path = TestModelPath(model);
  options.threads = 2;
  options.kv_bytes = size_t{64} << 20;
  return options;
}

inline Tokens RandomTokens(int n, uint64_t seed, int n_vocab = kTestVocab) {
  std::mt19937_64 random(seed);
  Tokens tokens(static_cast<size_t>(n));
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % static_cast<uint64_t>(n_vocab));
  return tokens;
}

inline SamplingParams Greedy(int max_tokens) {
  SamplingParams params;
  params.temperature = 0;
  params.max_tokens = max_tokens;
  params.ignore_eos = true;
  return params;
}

inline SamplingParams Seeded(int max_tokens, uint64_t seed) {
  SamplingParams params = Greedy(max_tokens);
  params.temperature = 1;
  params.seed = seed;
  return params;
}

// What became of one choice.
struct Output {
  Tokens tokens;
  std::string text;
  std::vector<uint64_t> logits;  // a hash of each row that was sampled from
  std::vector<SampledLogprobs> logprobs;
  Event end;     // the event with the finish reason
  int ends = 0;  // how many of those
};

// Threads: one. Owns: the engine. Fails how: by EXPECT; each step checks the store's and the scheduler's invariants.
class Driver {
 public:
  explicit Driver(const EngineOptions& options) {
    auto engine = Engine::Create(options);
    EXPECT_TRUE(engine.ok()) << engine.status().ToString();
    engine_ = std::move(engine).value();
    engine_->ObserveLogits([this](RequestId request, int choice, int position, std::span<const float> logits) {
      Output& output = of(request, choice);
      output.logits.push_back(HashSpan(logits, static_cast<uint64_t>(position)));
    });
  }

  Engine& engine() { return *engine_; }
  // Of all requests that ever ran; their choices appear with the first token or the end.
  Output& of(RequestId request, int choice = 0) { return outputs_[{request, choice}]; }
  const std::map<std::pair<RequestId, int>, Output>& outputs() const { return outputs_; }
  const std::vector<Event>& events() const { return events_; }  // of the last step

  RequestId Submit(Tokens prompt, SamplingParams sampling, DomainId domain = DomainId(0)) {
    Request request;
    request.prompt = std::move(prompt);
    request.sampling = std::move(sampling);
    request.domain = domain;
    auto id = engine_->Submit(std::move(request));
    EXPECT_TRUE(id.ok()) << id.status().ToString();
    return id.ok() ? *id : RequestId();
  }

  Status SubmitStatus(Tokens prompt, const SamplingParams& sampling) {
    Request request;
    request.prompt = std::move(prompt);
    request.sampling = sampling;
    return engine_->Submit(std::move(request)).status();
  }

  bool Step() {
    events_.clear();
    const bool busy = engine_->Step(events_);
    EXPECT_TRUE(busy || events_.empty());
    EXPECT_LE(engine_->stats().running, engine_->options().max_running);
    if (check_integrity_) engine_->cache().CheckIntegrity();
    for (const Event& event : events_) {
      Output& output = of(event.request, event.choice);
      EXPECT_EQ(output.ends, 0) << "an event after the end of a choice";
      EXPECT_TRUE(text::IsValidUtf8(event.text));
      if (event.token >= 0) {
        output.tokens.push_back(event.token);
        output.logprobs.push_back(event.logprobs);
      }
      output.text += event.text;
      if (event.finish == FinishReason::kNone) continue;
      EXPECT_EQ(event.output_tokens, static_cast<int>(output.tokens.size()));
      output.end = event;
      ++output.ends;
    }
    return busy;
  }

  void Run() {
    while (Step()) {
    }
    EXPECT_TRUE(engine_->idle());
  }

  // Nothing is held but what the prefix cache keeps, and nothing at all without it.
  void ExpectAllFree() {
    const EngineStats stats = engine_->stats();
    EXPECT_EQ(stats.running, 0);
    EXPECT_EQ(stats.waiting, 0);
    EXPECT_EQ(engine_->kv_stats().running_bytes, 0u);
    EXPECT_EQ(engine_->kv_stats().logical_bytes, 0u);
    // The engine hands out its store for reading; it is idle now.
    const_cast<kv::KvCache&>(engine_->cache()).DropPrefixCache();
    EXPECT_EQ(engine_->kv_stats().used_bytes, 0u);
    EXPECT_EQ(engine_->kv_stats().held_bytes, 0u);
    engine_->cache().CheckIntegrity();
  }

  void set_check_integrity(bool check) { check_integrity_ = check; }

 private:
  std::unique_ptr<Engine> engine_;
  std::map<std::pair<RequestId, int>, Output> outputs_;
  std::vector<Event> events_;
  bool check_integrity_ = true;
};

}  // namespace jointkv::engine
