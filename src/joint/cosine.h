// Cosine: the policy of arXiv 2601.03067 (section numbers of joint/README.md's contract hold for it too).
//
// Blocks are compared by the cosine of their keys, flattened and rotated by position, on a fixed grid of kGridTokens;
// values follow their keys. A representative is the renormalised mean direction of its members; each table slot keeps
// its member's own norm as a factor. The first and last kExemptLayers layers are left alone.
//   CFF   within one prompt, between its chunks, while it is prefilled
//   BFF   between running requests, when one enters decode, and as its generated blocks seal
// A new block is paired with the most similar representative, itself the result of such pairings. Unlike the paper's
// code, no member may be farther from its representative than the threshold: every representative carries a bound on
// the angle to its worst member, and a pairing that would break it does not move the mean, or is not made.
//
// Threads: as Fusion. Owns: records. Fails how: never.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "base/thread_pool.h"
#include "joint/policy.h"
#include "kv/kv_cache.h"

namespace jointkv::joint {

enum class Phase : uint8_t {
  kPrefill,
  kEntersDecode,  // the last of the prompt was just computed
  kDecode,
};

class Cosine {
 public:
  static constexpr int kGridTokens = 16;
  static constexpr int kExemptLayers = 2;

  Cosine(const FusionOptions& options, kv::KvCache& cache, ThreadPool& pool);

  void OnSealed(SequenceId sequence, kv::SealedRange sealed, Phase phase, FusionStats& stats);
  // The block is gone.
  void Remove(BlockId block);

  int64_t representatives() const { return static_cast<int64_t>(layer_of_.size()); }
  size_t metadata_bytes() const;
  void CheckIntegrity() const;

 private:
  struct Record {
    BlockId k;
    BlockId v;
    DomainId domain;
    int64_t serial = 0;    // of the sequence whose block it was
    int chunk = 0;         // of that sequence
    int index = 0;         // logical block of that sequence
    bool decodes = false;  // that sequence has entered decode: a candidate for others
    int weight = 1;        // blocks that its mean is made of
    double angle = 0;      // proven: no member's keys are farther away
    uint64_t content = 0;  // hash of the first member's tokens
  };
  // A block or representative that gives way to another.
  struct Landing {
    int index = 0;  // logical block; -1: a representative, wherever it is used
    BlockId k;      // of what gives way; invalid: nothing does
    BlockId v;
    BlockId target_k;
    BlockId target_v;
    double k_scale = 1;
    double v_scale = 1;
    bool equal_tokens = false;
    double angle = 0;
  };
  // What one layer does in one call.
  struct Layer {
    std::vector<Record> records;
    std::vector<Landing> landings;
    std::vector<int> added;  // logical blocks that became representatives
    int64_t offered = 0;
    int64_t rejected = 0;
    std::vector<std::byte> scratch;  // one block
  };

  void SealLayer(SequenceId sequence, kv::SealedRange sealed, Phase phase, int layer);
  void EnterDecode(SequenceId sequence, int layer);
  void Land(SequenceId sequence, int layer, FusionStats& stats);
  void MoveDown(SequenceId sequence, int layer);
  void Forget(BlockId block);
  bool Pair(int layer, const Record& from, int index, auto&& suits);
  bool Merge(int layer, const Record& from, Record& to, double cosine, Landing& landing);
  double BlendDirections(kv::Kind kind, const Record& from, const Record& to, std::byte* out) const;
  double Product(kv::Kind kind, BlockId a, const std::byte* b) const;

  FusionOptions options_;
  kv::KvCache& cache_;
  ThreadPool& pool_;
  double limit_;  // largest angle
  std::vector<Layer> layers_;
  std::unordered_map<BlockId, int> layer_of_;  // by the key block of each record
};

}  // namespace jointkv::joint
