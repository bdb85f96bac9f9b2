#include "server/status_json.h"

#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "server/compression.h"

namespace jointkv::server {

std::string StatusJson(const engine::Engine& engine) {
  using nlohmann::json;
  const engine::EngineStats stats = engine.stats();
  const kv::KvStats kv = engine.kv_stats();
  const joint::FusionStats fusion = engine.fusion_stats();
  const joint::FusionOptions& policy = engine.options().fusion;
  const kv::SharingStats sharing = engine.sharing_stats(kSlotsPerWalk);
  const Compression compression = CompressionOf(kv, sharing);
  return json({{"time_s", MonotonicSeconds()},
               {"max_context", engine.max_context()},
               {"max_running", engine.options().max_running},
               {"running", stats.running},
               {"waiting", stats.waiting},
               {"steps", stats.steps},
               {"prompt_tokens", stats.prompt_tokens},
               {"prefill_tokens", stats.prefill_tokens},
               {"output_tokens", stats.output_tokens},
               {"preemptions", stats.preemptions},
               {"prefix_query_tokens", kv.prefix_query_tokens},
               {"prefix_hit_tokens", kv.prefix_hit_tokens},
               {"kv",
                {{"capacity_bytes", kv.capacity_bytes},
                 {"held_bytes", kv.held_bytes},
                 {"physical_bytes", kv.running_bytes},
                 {"cached_bytes", kv.used_bytes - kv.running_bytes},
                 {"logical_bytes", kv.logical_bytes},
                 {"copies_on_write", kv.copies_on_write},
                 {"evicted_blocks", kv.evicted_blocks}}},
               {"compression",
                {{"total", compression.total},
                 {"exact_sharing", compression.exact_sharing},
                 {"fusion", compression.fusion},
                 {"codec", compression.codec}}},
               {"slots",
                {{"private", sharing.private_slots}, {"prefix", sharing.prefix_slots}, {"fused", sharing.fused_slots}}},
               {"fusion",
                {{"policy", joint::PolicyName(policy.policy)},
                 {"budget", policy.budget},
                 {"offered_blocks", fusion.offered},
                 {"fused_blocks", fusion.fused},
                 {"fused_equal_tokens", fusion.fused_equal_tokens},
                 {"residual_blocks", fusion.residuals},
                 {"rejected_blocks", fusion.rejected},
                 {"representatives", fusion.representatives},
                 {"worst_nmse", fusion.worst_nmse},
                 {"seconds", fusion.fusion_s}}}})
      .dump();
}

}  // namespace jointkv::server
