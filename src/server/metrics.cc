#include "server/metrics.h"

#include <array>
#include <map>
#include <utility>
#include <vector>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include "base/clock.h"
#include "server/compression.h"

namespace jointkv::server {
namespace {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using Bounds = Histogram::BucketBoundaries;

constexpr double kWalkEveryS = 1;

// vLLM's bounds: vllm/v1/metrics/loggers.py.
const Bounds kFirstTokenBounds = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                  1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const Bounds kTokenBounds = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
const Bounds kRequestBounds = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                               30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Bounds kCountBounds = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000};
const Bounds kKlBounds = {1e-5, 1e-4, 3e-4, .001, .003, .01, .03, .1, .3, 1, 3, 10};

// The labels of kv::SharingStats::blocks.
constexpr std::array<const char*, kv::SharingStats::kReaderClasses> kReaders = {"1",    "2",     "3-4",   "5-8",
                                                                                "9-16", "17-32", "33-64", "65+"};

// The engine counts; a counter follows.
void Follow(Counter& counter, double value) {
  if (value > counter.Value()) counter.Increment(value - counter.Value());
}
void Follow(Counter& counter, int64_t value) { Follow(counter, static_cast<double>(value)); }

}  // namespace

struct Metrics::Instruments {
  struct Tenant {
    Gauge& running;
    Gauge& waiting;
    Gauge& kv_bytes;
  };

  explicit Instruments(std::string model_name) : model_labels{{"model_name", std::move(model_name)}} {
    for (const char* readers : kReaders) {
      blocks.push_back(&AddGauge("jointkv_kv_blocks", "Physical blocks of running sequences, by the number of readers.",
                                 {{"readers", readers}}));
    }
  }

  template <typename Builder>
  auto& Add(Builder builder, const char* name, const char* help) {
    return builder.Name(name).Help(help).Labels(model_labels).Register(registry);
  }
  Counter& AddCounter(const char* name, const char* help, const prometheus::Labels& labels = {}) {
    return Add(prometheus::BuildCounter(), name, help).Add(labels);
  }
  Gauge& AddGauge(const char* name, const char* help, const prometheus::Labels& labels = {}) {
    return Add(prometheus::BuildGauge(), name, help).Add(labels);
  }
  Histogram& AddHistogram(const char* name, const char* help, const Bounds& bounds) {
    return Add(prometheus::BuildHistogram(), name, help).Add({}, bounds);
  }
  Counter& AddFinished(const char* reason) {
    return AddCounter("vllm:request_success_total", "Choices that ended, by the reason.",
                      {{"finished_reason", reason}});
  }
  Gauge& AddBytes(const char* kind) {
    return AddGauge(
        "jointkv_kv_bytes",
        "KV memory. capacity: its limit; held: slabs in use; running: blocks that running sequences refer to "
        "(physical); cached: blocks kept for prefixes alone; logical: the running sequences' tokens as "
        "private 16-bit K and V; metadata: tables, counts and indexes.",
        {{"kind", kind}});
  }
  Gauge& AddFactor(const char* factor) {
    return AddGauge("jointkv_kv_compression_factor",
                    "Factors of jointkv_kv_compression: exact_sharing (prefixes, forks, windows), fusion, codec.",
                    {{"factor", factor}});
  }
  Gauge& AddSlots(const char* state) {
    return AddGauge("jointkv_kv_slots", "Block table slots of running sequences, by what they refer to.",
                    {{"state", state}});
  }
  Counter& AddFused(const char* tokens) {
    return AddCounter("jointkv_fusion_fused_blocks_total",
                      "Physical blocks that gave their bytes up for a representative of equal or other tokens.",
                      {{"tokens", tokens}});
  }
  Counter& AddRejected(const char* reason) {
    return AddCounter("jointkv_fusion_rejected_blocks_total",
                      "Physical blocks that stayed. over_budget: there were candidates, none near enough; "
                      "no_candidate: there were none.",
                      {{"reason", reason}});
  }

  prometheus::Labels model_labels;
  prometheus::Registry registry;

  Gauge& running = AddGauge("vllm:num_requests_running", "Sequences in the running batch.");
  Gauge& waiting = AddGauge("vllm:num_requests_waiting", "Requests waiting to run.");
  Gauge& kv_usage = AddGauge("vllm:kv_cache_usage_perc", "KV memory that running sequences refer to; 1 is all of it.");
  Counter& prefix_queries = AddCounter("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.");
  Counter& prefix_hits = AddCounter("vllm:prefix_cache_hits_total", "Tokens taken from the prefix cache.");
  Counter& preemptions = AddCounter("vllm:num_preemptions_total", "Sequences preempted for lack of KV memory.");
  Counter& prompt_tokens = AddCounter("vllm:prompt_tokens_total", "Prompt tokens of admitted requests.");
  Counter& generation_tokens = AddCounter("vllm:generation_tokens_total", "Tokens given.");
  Counter& finished_stop = AddFinished("stop");
  Counter& finished_length = AddFinished("length");
  Counter& finished_abort = AddFinished("abort");
  Counter& finished_error = AddFinished("error");

  Histogram& first_token =
      AddHistogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", kFirstTokenBounds);
  Histogram& inter_token =
      AddHistogram("vllm:inter_token_latency_seconds", "Between two tokens of a choice.", kTokenBounds);
  Histogram& output_token = AddHistogram("vllm:time_per_output_token_seconds",
                                         "vllm:inter_token_latency_seconds under its former name.", kTokenBounds);
  Histogram& request_output_token = AddHistogram("vllm:request_time_per_output_token_seconds",
                                                 "Mean between two tokens of a choice, per choice.", kTokenBounds);
  Histogram& end_to_end = AddHistogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", kRequestBounds);
  Histogram& queue = AddHistogram("vllm:request_queue_time_seconds", "From arrival to admission.", kRequestBounds);
  Histogram& inference =
      AddHistogram("vllm:request_inference_time_seconds", "From admission to the end.", kRequestBounds);
  Histogram& prefill =
      AddHistogram("vllm:request_prefill_time_seconds", "From admission to the first token.", kRequestBounds);
  Histogram& decode =
      AddHistogram("vllm:request_decode_time_seconds", "From the first token to the end.", kRequestBounds);
  Histogram& request_prompt = AddHistogram("vllm:request_prompt_tokens", "Tokens of a prompt.", kCountBounds);
  Histogram& request_generation =
      AddHistogram("vllm:request_generation_tokens", "Tokens given for a choice.", kCountBounds);

  Gauge& bytes_capacity = AddBytes("capacity");
  Gauge& bytes_held = AddBytes("held");
  Gauge& bytes_running = AddBytes("running");
  Gauge& bytes_cached = AddBytes("cached");
  Gauge& bytes_logical = AddBytes("logical");
  Gauge& bytes_metadata = AddBytes("metadata");
  Gauge& compression = AddGauge("jointkv_kv_compression", "Logical / running KV bytes; 1 when nothing runs.");
  Gauge& factor_exact = AddFactor("exact_sharing");
  Gauge& factor_fusion = AddFactor("fusion");
  Gauge& factor_codec = AddFactor("codec");
  std::vector<Gauge*> blocks;
  Gauge& slots_private = AddSlots("private");
  Gauge& slots_prefix = AddSlots("prefix");
  Gauge& slots_fused = AddSlots("fused");
  Counter& copies = AddCounter("jointkv_kv_copies_on_write_total", "Open blocks copied because a fork shared them.");
  Counter& evicted = AddCounter("jointkv_kv_evicted_blocks_total", "Logical blocks evicted from the prefix cache.");

  Counter& offered = AddCounter("jointkv_fusion_offered_blocks_total", "Physical blocks that fusion looked at.");
  Counter& fused_equal = AddFused("equal");
  Counter& fused_other = AddFused("other");
  Counter& residuals = AddCounter("jointkv_fusion_residual_blocks_total",
                                  "Physical blocks that gave all but their difference from a representative up.");
  Counter& rejected_budget = AddRejected("over_budget");
  Counter& rejected_alone = AddRejected("no_candidate");
  Counter& fusion_seconds = AddCounter("jointkv_fusion_seconds_total", "Time spent on lookup, test and merge.");
  Gauge& representatives = AddGauge("jointkv_fusion_representatives", "Blocks that others may be fused with.");
  Gauge& worst_nmse = AddGauge("jointkv_fusion_worst_nmse",
                               "Largest proven NMSE of any member against its representative since the start.");
  Counter& steps = AddCounter("jointkv_steps_total", "Engine steps.");
  Counter& prefill_seconds =
      AddCounter("jointkv_prefill_seconds_total", "Time of steps, by the share of prompts' rows.");
  Counter& decode_seconds = AddCounter("jointkv_decode_seconds_total", "Time of steps, by the share of decoding rows.");
  Counter& prefill_tokens =
      AddCounter("jointkv_prefill_tokens_total", "Prompt tokens computed, also again after a preemption.");
  Counter& shadow_runs = AddCounter("jointkv_shadow_runs_total", "Requests run again with exact KV and compared.");
  Counter& shadow_tokens = AddCounter("jointkv_shadow_tokens_total", "Output tokens compared in shadow runs.");
  Counter& shadow_dropped = AddCounter("jointkv_shadow_dropped_total",
                                       "Requests sampled for the shadow check that were not compared in the end.");
  Histogram& shadow_kl = AddHistogram("jointkv_shadow_kl_nats",
                                      "KL(exact || served) per token, of requests run again with exact KV.", kKlBounds);

  std::map<DomainId, Tenant> tenants;
};

Metrics::Metrics(std::string model_name) : instruments_(std::make_unique<Instruments>(std::move(model_name))) {}
Metrics::~Metrics() = default;

void Metrics::NameTenant(DomainId domain, const std::string& name) {
  Instruments& m = *instruments_;
  const prometheus::Labels labels = {{"tenant", name}};
  m.tenants.insert(
      {domain,
       {m.AddGauge("jointkv_tenant_requests_running", "Sequences of a tenant in the running batch.", labels),
        m.AddGauge("jointkv_tenant_requests_waiting", "Requests of a tenant waiting to run.", labels),
        m.AddGauge("jointkv_tenant_kv_bytes", "KV memory that a tenant's running sequences refer to.", labels)}});
}

void Metrics::RequestFinished(const engine::Event& finish) {
  Instruments& m = *instruments_;
  switch (finish.finish) {
    case engine::FinishReason::kNone: return;
    case engine::FinishReason::kStop: m.finished_stop.Increment(); break;
    case engine::FinishReason::kLength: m.finished_length.Increment(); break;
    case engine::FinishReason::kCancelled: m.finished_abort.Increment(); break;
    case engine::FinishReason::kError: m.finished_error.Increment(); break;
  }
  const engine::RequestTimes& times = finish.times;
  m.end_to_end.Observe(times.finished_s - times.submitted_s);
  m.request_generation.Observe(finish.output_tokens);
  const bool started = times.started_s > 0;
  const bool decoded = times.first_token_s > 0;
  if (started) m.inference.Observe(times.finished_s - times.started_s);
  if (decoded) m.decode.Observe(times.finished_s - times.first_token_s);
  if (finish.output_tokens > 1) {
    m.request_output_token.Observe((times.finished_s - times.first_token_s) / (finish.output_tokens - 1));
  }
  // The prompt of a request is one, however many choices it has.
  if (finish.choice != 0) return;
  m.request_prompt.Observe(finish.prompt_tokens);
  if (started) m.queue.Observe(times.started_s - times.submitted_s);
  if (!decoded) return;
  m.first_token.Observe(times.first_token_s - times.submitted_s);
  m.prefill.Observe(times.first_token_s - times.started_s);
}

void Metrics::TokenEmitted(double inter_token_s) {
  instruments_->inter_token.Observe(inter_token_s);
  instruments_->output_token.Observe(inter_token_s);
}

void Metrics::UpdateShadow(const engine::ShadowCheck::Stats& stats, const std::vector<double>& run_kls) {
  for (const double kl_nats : run_kls) instruments_->shadow_kl.Observe(kl_nats);
  Follow(instruments_->shadow_runs, stats.runs);
  Follow(instruments_->shadow_tokens, stats.rows);
  Follow(instruments_->shadow_dropped, stats.dropped);
}

void Metrics::Update(const engine::Engine& engine) {
  Instruments& m = *instruments_;
  const engine::EngineStats stats = engine.stats();
  m.running.Set(stats.running);
  m.waiting.Set(stats.waiting);
  Follow(m.preemptions, stats.preemptions);
  Follow(m.prompt_tokens, stats.prompt_tokens);
  Follow(m.generation_tokens, stats.output_tokens);
  Follow(m.steps, stats.steps);
  Follow(m.prefill_seconds, stats.prefill_s);
  Follow(m.decode_seconds, stats.decode_s);
  Follow(m.prefill_tokens, stats.prefill_tokens);

  const kv::KvStats kv = engine.kv_stats();
  m.kv_usage.Set(static_cast<double>(kv.running_bytes) / static_cast<double>(kv.capacity_bytes));
  Follow(m.prefix_queries, kv.prefix_query_tokens);
  Follow(m.prefix_hits, kv.prefix_hit_tokens);
  Follow(m.copies, kv.copies_on_write);
  Follow(m.evicted, kv.evicted_blocks);
  m.bytes_capacity.Set(static_cast<double>(kv.capacity_bytes));
  m.bytes_held.Set(static_cast<double>(kv.held_bytes));
  m.bytes_running.Set(static_cast<double>(kv.running_bytes));
  m.bytes_cached.Set(static_cast<double>(kv.used_bytes - kv.running_bytes));
  m.bytes_logical.Set(static_cast<double>(kv.logical_bytes));
  for (const auto& [domain, of_domain] : engine.domain_stats()) {
    const auto tenant = m.tenants.find(domain);
    if (tenant == m.tenants.end()) continue;
    tenant->second.running.Set(of_domain.running);
    tenant->second.waiting.Set(of_domain.waiting);
  }

  const double now_s = MonotonicSeconds();
  if (walked_s_ > 0 && now_s - walked_s_ < kWalkEveryS) return;
  walked_s_ = now_s;
  const joint::FusionStats fusion = engine.fusion_stats();
  Follow(m.offered, fusion.offered);
  Follow(m.fused_equal, fusion.fused_equal_tokens);
  Follow(m.fused_other, fusion.fused - fusion.fused_equal_tokens);
  Follow(m.rejected_budget, fusion.rejected);
  Follow(m.residuals, fusion.residuals);
  Follow(m.rejected_alone, fusion.offered - fusion.fused - fusion.residuals - fusion.rejected);
  Follow(m.fusion_seconds, fusion.fusion_s);
  m.representatives.Set(static_cast<double>(fusion.representatives));
  m.worst_nmse.Set(fusion.worst_nmse);
  m.bytes_metadata.Set(static_cast<double>(kv.metadata_bytes + fusion.metadata_bytes));

  const kv::SharingStats sharing = engine.sharing_stats(kSlotsPerWalk);
  for (int i = 0; i < kv::SharingStats::kReaderClasses; ++i) m.blocks[i]->Set(sharing.blocks[i]);
  m.slots_private.Set(sharing.private_slots);
  m.slots_prefix.Set(sharing.prefix_slots);
  m.slots_fused.Set(sharing.fused_slots);
  const Compression compression = CompressionOf(kv, sharing);
  m.compression.Set(compression.total);
  m.factor_exact.Set(compression.exact_sharing);
  m.factor_fusion.Set(compression.fusion);
  m.factor_codec.Set(compression.codec);
  for (auto& [domain, tenant] : m.tenants) {
    const auto bytes = sharing.domain_bytes.find(domain);
    tenant.kv_bytes.Set(bytes == sharing.domain_bytes.end() ? 0 : bytes->second);
  }
}

std::string Metrics::Render() const { return prometheus::TextSerializer().Serialize(instruments_->registry.Collect()); }

}  // namespace jointkv::server
