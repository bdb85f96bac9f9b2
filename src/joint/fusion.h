// Fusion: joint encoding of similar KV blocks. Decides which sealed blocks share one representative.
//
// The contract (candidates, bound, ownership) is joint/README.md; the method and its theory docs/joint-encoding.md.
//
// Threads: called by one thread (the engine's) between steps, works on the pool's. Owns: the table of representatives;
// their bytes belong to the block store. Fails how: never; what does not fit the bound stays private.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "joint/cosine.h"
#include "joint/policy.h"
#include "joint/representatives.h"
#include "joint/sketches.h"
#include "joint/statistics.h"
#include "kv/kv_cache.h"

namespace jointkv::joint {

// What the store has to be like for a policy.
kv::BlockCutter CutterFor(const FusionOptions& options, std::vector<uint8_t> ends_block);
void ShapeStore(const FusionOptions& options, const codec::BlockLayout& layout, kv::KvCache::Options& store);

class Fusion {
 public:
  // By layer, (n_kv_heads, head_dim / 2): what PairScales calls query_energy, of the queries so far; empty: none.
  using QueryEnergy = std::function<std::span<const double>(int layer)>;

  // The store and the tables that its keys are rotated with (by layer; null: not rotated) must outlive it. Without
  // query_energy keys are encoded as if queries weighed all channels alike.
  Fusion(const FusionOptions& options, std::vector<const dense::RopeTable*> rope, kv::KvCache& cache, ThreadPool& pool,
         QueryEnergy query_energy = nullptr);

  // How a new sequence is to be created.
  kv::KvCache::Sharing SharingOf(bool request_allows) const;

  // The blocks [sealed.first, sealed.last) of a sequence, sealed by Commit and not offered before; may be none.
  void OnSealed(SequenceId sequence, kv::SealedRange sealed, Phase phase);

  // Whether a prompt's blocks are best offered all at once when its last one is sealed (sooner where memory is short):
  // the rest of the prompt is then computed from exact blocks.
  bool waits_for_prompt() const { return encodes_ || (enabled() && options_.policy == Policy::kBounded); }
  // Whether sealed blocks are encoded, fused or not.
  bool encodes() const { return encodes_; }

  // Forgets representatives whose last owner is gone. OnSealed begins with it.
  void DropReleased();

  // Off: nothing is fused from now on; what is fused stays so.
  void set_enabled(bool enabled) { enabled_ = enabled; }
  bool enabled() const { return enabled_ && options_.policy != Policy::kOff; }

  FusionStats stats() const;
  // Those of them that only grow: no look at each group.
  const FusionStats& counters() const { return stats_; }
  // The mean energy of a token in this table, which distortion is relative to; 0 before anything was sealed.
  double energy(int table) const { return statistics_.energy(table); }
  // CHECKs that representatives live and are within the budget. Slow.
  void CheckIntegrity() const;

 private:
  // What becomes of one sealed physical block.
  struct Decision {
    enum class Kind : uint8_t { kLeave, kStay, kFuse, kDiffer } kind = Kind::kLeave;
    BlockId target;                // kFuse; kDiffer: what from
    bool equal_tokens = false;     // kFuse
    Sketches::Sketch sketch = {};  // kStay, with `similarity`
    bool rejected = false;         // kStay: had candidates
    bool listed = false;           // kStay: stands for others from now on
    // kStay, kDiffer: what its bytes are in. If that is not what the store allocated, it is still to be moved to such a
    // place.
    codec::Codec codec = codec::Codec::kBf16;
    float bound = 0;  // the member's (kFuse), or the block's own distance to what it was (kStay)
  };
  // Of one thread: three blocks.
  struct Scratch {
    std::byte* candidate = nullptr;  // a representative, decoded
    std::byte* blend = nullptr;
    std::byte* encoded = nullptr;
  };
  struct Sealed {
    int index = 0;  // logical block
    GroupId group;
  };

  void EncodeBounded(SequenceId sequence, kv::SealedRange range);
  void CollectSealed(SequenceId sequence, kv::SealedRange range);
  // Listed, encoded or settled already: the sequence took a block that was offered before.
  bool Known(BlockId block) const;
  // Lets the table's statistics count these blocks, unless its scale is fixed.
  void Measure(SequenceId sequence, int table);
  // Fixes the scales whose statistics count enough tokens.
  void FixScales();
  void FixKeyReference(int table);
  Decision Decide(SequenceId sequence, int table, const Sealed& sealed, const Scratch& scratch);
  Decision Join(int table, GroupId group, std::byte* data, const kv::LogicalBlock& block, const Scratch& scratch);
  // The block as what it differs by from decision.target, if that takes less room and is within the budget; else what
  // it was given.
  Decision Differ(int table, double distance, std::byte* data, const kv::LogicalBlock& block, const Scratch& scratch,
                  Decision decision);
  // What a block that stays is to be in.
  codec::Codec CodecOf(int table, const kv::LogicalBlock& block) const;
  BlockId MoveEncoded(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision);
  struct Candidate {
    BlockId block;
    double distance = 0;
  };
  // The nearest representative, perhaps beyond the budget. Sets what else it learns in `decision`.
  Candidate Nearest(int table, GroupId group, const std::byte* data, const kv::LogicalBlock& block,
                    const Scratch& scratch, Decision& decision) const;
  // What a representative stands for: its block, or that decoded into `scratch`.
  const std::byte* Values(int table, BlockId representative, int cap, int tokens, std::byte* scratch) const;
  void Encode(int table, codec::Codec to, const std::byte* block, int cap, int tokens, std::byte* out) const;
  void Decode(int table, codec::Codec from, const std::byte* encoded, int cap, int tokens, std::byte* out) const;
  size_t BytesIn(codec::Codec codec, int cap, int tokens) const;  // of a block
  codec::Reference ReferenceOf(int table) const;
  Sketches::Shape ShapeOf(GroupId group) const;
  // Distance in the policy's measure: sqrt(NMSE).
  double Distance(int table, std::span<const float, codec::kBlockTokensMax> squares, int tokens) const;
  double Between(int table, const std::byte* a, const std::byte* b, int cap, int tokens) const;
  void Redirect(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision);
  void Keep(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision);
  void KeepDifference(SequenceId sequence, int table, const Sealed& sealed, const Decision& decision);
  void Rename(int table, const Sealed& sealed, BlockId from, BlockId to);

  FusionOptions options_;
  kv::KvCache& cache_;
  ThreadPool& pool_;
  QueryEnergy query_energy_;
  bool enabled_ = true;
  bool encodes_ = false;
  codec::Codec written_;  // what the forward pass leaves blocks in
  bool fuses_ = false;    // the present call
  Statistics statistics_;
  Representatives representatives_;  // bounded
  Sketches sketches_;                // of them, with `similarity`
  Cosine cosine_;
  std::vector<float> inverse_energy_;  // (tables); 0: not known yet
  std::vector<Sealed> sealed_;         // the present call's
  std::vector<Decision> decisions_;    // (tables, sealed)
  std::vector<BlockId> released_;
  std::vector<std::byte> scratch_;  // (threads, three blocks)
  FusionStats stats_;
};

}  // namespace jointkv::joint
