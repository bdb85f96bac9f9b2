// --deterministic: tokens and logits, bit for bit, whatever runs beside a request; and preemption, which may not show.
#include <algorithm>
#include <numeric>

#include "engine/engine.h"
#include "engine/test_engine.h"

namespace jointkv::engine {
namespace {

struct Job {
  Tokens prompt;
  SamplingParams sampling;
};

// How a run differs from the others.
struct Setting {
  const char* name;
  int step_tokens = 512;
  int threads = 2;
  int max_running = 64;
  bool prefix_cache = false;
  size_t kv_bytes = size_t{64} << 20;
  bool one_by_one = false;  // each request alone
  bool reversed = false;    // order of arrival
  int steps_between = 0;    // arrivals
};

struct Result {
  std::vector<Tokens> tokens;  // by job and choice
  std::vector<std::vector<uint64_t>> logits;
  EngineStats stats;
};

Result RunJobs(EngineOptions options, const Setting& setting, const std::vector<Job>& jobs) {
  options.deterministic = true;
  options.step_tokens = setting.step_tokens;
  options.threads = setting.threads;
  options.max_running = setting.max_running;
  options.prefix_cache = setting.prefix_cache;
  options.kv_bytes = setting.kv_bytes;
  Driver driver(options);
  std::vector<size_t> order(jobs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (setting.reversed) std::ranges::reverse(order);
  std::vector<RequestId> ids(jobs.size());
  for (const size_t job : order) {
    ids[job] = driver.Submit(jobs[job].prompt, jobs[job].sampling);
    if (setting.one_by_one) driver.Run();
    for (int step = 0; step < setting.steps_between; ++step) driver.Step();
  }
  driver.Run();
  Result result;
  result.stats = driver.engine().stats();
  for (size_t job = 0; job < jobs.size(); ++job) {
    for (int choice = 0; choice < jobs[job].sampling.n; ++choice) {
      const Output& output = driver.of(ids[job], choice);
      EXPECT_EQ(output.ends, 1);
      EXPECT_TRUE(output.end.error.ok()) << output.end.error.ToString();
      result.tokens.push_back(output.tokens);
      result.logits.push_back(output.logits);
    }
  }
  driver.ExpectAllFree();
  return result;
}

void ExpectSame(const Result& result, const Result& reference, const std::string& name) {
  ASSERT_EQ(result.tokens.size(), reference.tokens.size());
  for (size_t i = 0; i < result.tokens.size(); ++i) {
    EXPECT_EQ(result.tokens[i], reference.tokens[i]) << name << ": tokens of " << i;
    EXPECT_EQ(result.logits[i], reference.logits[i]) << name << ": logits of " << i;
  }
}

// Lengths around block and step ends, a common start for some, all kinds of sampling.
std::vector<Job> MadeUpJobs(int n) {
  std::vector<Job> jobs;
  const Tokens common = RandomTokens(70, 1);
  for (int i = 0; i < n; ++i) {
    Job job;
    if (i % 3 == 0) job.prompt = common;
    const Tokens own = RandomTokens(1 + i * 37 % 90, 100 + static_cast<uint64_t>(i));
    job.prompt.insert(job.prompt.end(), own.begin(), own.end());
    job.sampling = i % 2 == 0 ? Greedy(30 + i % 7 * 8) : Seeded(30 + i % 5 * 11, static_cast<uint64_t>(i));
    if (i % 4 == 1) job.sampling.repetition_penalty = 1.3f;
    if (i % 5 == 2) job.sampling.n = 3;
    jobs.push_back(std::move(job));
  }
  return jobs;
}

class DeterminismTest : public testing::TestWithParam<const char*> {};

TEST_P(DeterminismTest, NothingBesideARequestShows) {
  const EngineOptions options = TestOptions(GetParam());
  const std::vector<Job> jobs = MadeUpJobs(16);
  Setting alone = {"alone"};
  alone.one_by_one = true;
  const Result reference = RunJobs(options, alone, jobs);
  const size_t granule_bytes = Driver(options).engine().cache().shape().layout.granule_bytes();
  const size_t small = 2400 * granule_bytes;
  const size_t smaller = 2160 * granule_bytes;  // shorter steps get by with less
  const Setting settings[] = {
      {.name = "together"},
      {.name = "steps of 1", .step_tokens = 1},
      {.name = "steps of 7", .step_tokens = 7},
      {.name = "steps of 64", .step_tokens = 64},
      {.name = "one thread", .threads = 1},
      {.name = "three threads", .threads = 3},
      {.name = "five at once", .max_running = 5},
      {.name = "reversed", .step_tokens = 64, .reversed = true},
      {.name = "trickling in", .step_tokens = 33, .steps_between = 3},
      {.name = "prefix cache", .prefix_cache = true},
      {.name = "prefix cache, trickling in", .prefix_cache = true, .steps_between = 9},
      {.name = "little room", .kv_bytes = small},
      {.name = "little room, steps of 7", .step_tokens = 7, .threads = 3, .kv_bytes = smaller},
      {.name = "little room, prefix cache", .prefix_cache = true, .kv_bytes = small, .reversed = true},
  };
  for (const Setting& setting : settings) {
    const Result result = RunJobs(options, setting, jobs);
    ExpectSame(result, reference, setting.name);
    if (setting.kv_bytes <= small) {
      EXPECT_GT(result.stats.preemptions, 0) << setting.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, DeterminismTest, testing::Values("llama", "llama-q4_1", "gemma3"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

// Real prompts that share their start and differ in what they ask.
std::vector<std::string> RealPrompts(int n) {
  const char* tasks[] = {"Write the first sentence of a story about", "Explain in one sentence what is special about",
                         "List three facts about", "Write a short poem about"};
  const char* things[] = {"a lighthouse keeper", "the planet Saturn", "a lost umbrella", "honey bees",
                          "the number seven",    "an old violin",     "a night train",   "the city of Lisbon",
                          "a chess game",        "volcanoes",         "the colour blue", "a baker's first day",
                          "migrating birds",     "a broken clock",    "the Silk Road",   "a very small robot"};
  std::vector<std::string> prompts;
  for (int i = 0; i < n; ++i) {
    prompts.push_back(std::string("<|im_start|>system\nYou answer briefly and in plain words.<|im_end|>\n") +
                      "<|im_start|>user\n" + tasks[i / 16 % 4] + " " + things[i % 16] +
                      ".<|im_end|>\n<|im_start|>assistant\n");
  }
  return prompts;
}

// JOINTKV_TEST_PROMPTS sets the number of prompts, 8 (fewer take turns) to 64.
TEST(DeterminismTest, RealPrompts) {
  SKIP_WITHOUT_MODEL();
#ifdef JOINTKV_SANITIZED
  constexpr int kPrompts = 8;
#else
  constexpr int kPrompts = 16;
#endif
  const char* wanted = std::getenv("JOINTKV_TEST_PROMPTS");
  const int n = std::clamp(wanted == nullptr ? kPrompts : std::atoi(wanted), 8, 64);
  EngineOptions options;
  options.model_path = DefaultModelPath();
  auto tokenizer = text::Tokenizer::Open(options.model_path);
  ASSERT_TRUE(tokenizer.ok());
  std::vector<Job> jobs;
  for (const std::string& prompt : RealPrompts(n)) {
    auto tokens = (*tokenizer)->Encode(prompt, true, true);
    ASSERT_TRUE(tokens.ok());
    SamplingParams sampling = jobs.size() % 4 == 3 ? Seeded(48, jobs.size()) : Greedy(48);
    sampling.ignore_eos = jobs.size() % 4 != 0;  // most take all their tokens, so that room is short
    jobs.push_back({*tokens, sampling});
  }
  const Setting alone = {.name = "alone", .one_by_one = true};
  const Result reference = RunJobs(options, alone, jobs);
  // Room for a few of them.
  Setting tight = {.name = "together, little room", .kv_bytes = size_t{4} << 20};
  Result result = RunJobs(options, tight, jobs);
  EXPECT_GT(result.stats.preemptions, 0);
  RecordProperty("preemptions", static_cast<int>(result.stats.preemptions));
  ExpectSame(result, reference, tight.name);
  tight = {.name = "prefix cache, reversed",
           .step_tokens = 100,
           .threads = 1,
           .prefix_cache = true,
           .kv_bytes = size_t{4} << 20,
           .reversed = true};
  result = RunJobs(options, tight, jobs);
  ExpectSame(result, reference, tight.name);
}

}  // namespace
}  // namespace jointkv::engine
