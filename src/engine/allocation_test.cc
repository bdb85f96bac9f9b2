// No heap allocation in a steady decode step, but for the text of an event beyond the 15 bytes that std::string holds
// itself. Counts every malloc of the program, which the sanitizers do not allow.
#include <algorithm>

#include "engine/engine.h"
#include "engine/test_engine.h"

#if !defined(JOINTKV_SANITIZED) && defined(__GLIBC__)
#include <atomic>

namespace {
std::atomic<long> allocations{0};
}

extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t n, size_t bytes);
void* __libc_realloc(void* data, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_malloc(bytes);
}
void* calloc(size_t n, size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_calloc(n, bytes);
}
void* realloc(void* data, size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_realloc(data, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return __libc_memalign(alignment, bytes);
}
}

namespace jointkv::engine {
namespace {

// The allocations of each of `steps` steps, with all sequences decoding.
std::vector<long> CountSteps(EngineOptions options, int sequences, int prompt_tokens, int warm_up, int steps,
                             std::vector<size_t>* sealed = nullptr) {
  auto engine = Engine::Create(options);
  EXPECT_TRUE(engine.ok()) << engine.status().ToString();
  const int n_vocab = std::min((*engine)->tokenizer().n_vocab(), (*engine)->model().n_vocab());
  std::vector<Event> events;
  events.reserve(static_cast<size_t>(sequences) * 2);
  // Scratch grows to the largest step seen, so that comes first.
  Request longest;
  longest.prompt = RandomTokens(600, 1, n_vocab);
  longest.sampling = Greedy(3);
  longest.sampling.n = sequences;
  EXPECT_TRUE((*engine)->Submit(std::move(longest)).ok());
  while ((*engine)->Step(events)) events.clear();
  for (int i = 0; i < sequences; ++i) {
    Request request;
    request.prompt = RandomTokens(prompt_tokens, static_cast<uint64_t>(i), n_vocab);
    request.sampling = i % 2 == 0 ? Greedy(warm_up + steps + 100) : Seeded(warm_up + steps + 100, 1);
    if (i % 4 == 1) request.sampling.repetition_penalty = 1.1f;
    if (i % 4 == 2) request.sampling.stop = {"something long that does not come"};
    if (i % 4 == 3) request.sampling.top_p = 0.9f;
    EXPECT_TRUE((*engine)->Submit(std::move(request)).ok());
  }
  std::vector<long> counts(static_cast<size_t>(steps));
  for (int step = -warm_up; step < steps; ++step) {
    events.clear();
    const long before = allocations.load();
    (*engine)->Step(events);
    if (step < 0) continue;
    const auto texts = std::ranges::count_if(events, [](const Event& event) { return event.text.size() > 15; });
    counts[static_cast<size_t>(step)] = allocations.load() - before - texts;
    EXPECT_EQ(events.size(), static_cast<size_t>(sequences));
    if (sealed == nullptr) continue;
    size_t blocks = 0;
    for (int i = 0; i < sequences; ++i) {
      for (const kv::LogicalBlock& block : (*engine)->cache().blocks(SequenceId(i))) blocks += block.sealed;
    }
    sealed->push_back(blocks);
  }
  return counts;
}

class AllocationTest : public testing::TestWithParam<const char*> {
 protected:
  static EngineOptions Options() {
    EngineOptions options = TestOptions(GetParam() == std::string_view("default") ? "llama" : GetParam());
    if (GetParam() == std::string_view("default")) options.model_path = DefaultModelPath();
    options.max_running = 16;
    options.kv_bytes = size_t{256} << 20;
    return options;
  }
  void SetUp() override {
    if (GetParam() == std::string_view("default")) SKIP_WITHOUT_MODEL();
  }
};

TEST_P(AllocationTest, NoneInASteadyDecodeStep) {
  EngineOptions options = Options();
  options.prefix_cache = false;
  options.fusion.policy = joint::Policy::kOff;
  const std::vector<long> counts = CountSteps(options, 16, 60, 10, 100);
  EXPECT_EQ(counts, std::vector<long>(100, 0));
}

TEST_P(AllocationTest, NoneWithPrefixCacheWhereNoBlockIsSealed) {
  std::vector<size_t> sealed;
  const std::vector<long> counts = CountSteps(Options(), 16, 60, 10, 60, &sealed);
  int quiet = 0;
  for (size_t step = 1; step < counts.size(); ++step) {
    if (sealed[step] != sealed[step - 1]) continue;
    ++quiet;
    EXPECT_EQ(counts[step], 0) << "step " << step;
  }
  EXPECT_GT(quiet, 3);
}

INSTANTIATE_TEST_SUITE_P(Models, AllocationTest, testing::Values("llama", "llama-q4_1", "gemma3", "default"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace jointkv::engine

#endif
