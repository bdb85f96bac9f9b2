// What joint encoding may do, and what it has done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace jointkv::joint {

enum class Policy : uint8_t {
  kOff,      // exact sharing only
  kBounded,  // representatives under an error budget
  kCosine,   // arXiv 2601.03067: cosine threshold on keys, values follow
};

const char* PolicyName(Policy policy);
std::optional<Policy> ParsePolicy(std::string_view name);

struct FusionOptions {
  Policy policy = Policy::kBounded;

  // bounded
  float budget = 0.06F;     // tau: largest NMSE of any member against its representative
  bool similarity = false;  // candidates also among blocks with other tokens
  bool residuals = false;   // blocks beyond the budget may be kept as what they differ by from a representative

  // cosine
  float threshold = 0.7F;       // least cosine of two key blocks
  bool across_requests = true;  // BFF: blocks of different running requests, from entering decode on
  bool across_chunks = true;    // CFF: blocks of different chunks of one prompt, during prefill
  int chunk_tokens = 512;       // of CFF, as in the paper's code
};

struct FusionStats {
  int64_t offered = 0;             // physical blocks sealed under a policy
  int64_t fused = 0;               // of those, how many gave their bytes up for a representative's
  int64_t fused_equal_tokens = 0;  // of those, whose tokens are the representative's
  int64_t residuals = 0;           // kept as what they differ by from a representative
  int64_t rejected = 0;            // had a candidate, but neither of these came of it
  double worst_nmse = 0;           // largest proven NMSE that any member may have had against its representative
  int64_t encoded = 0;             // blocks that stayed and were encoded
  int64_t unencoded = 0;           // that stayed, and should have been, but there was no room to do it
  double fusion_s = 0;             // lookup, test, merge and encoding
  int64_t representatives = 0;     // now
  size_t metadata_bytes = 0;       // now
};

}  // namespace jointkv::joint
