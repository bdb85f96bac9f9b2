// How keys and values are stored, as options say it: K[,V] with codec names, for all layers or some.
#pragma once

#include <climits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "codec/codec.h"

namespace jointkv::engine {

struct KvType {
  codec::Codec k = codec::Codec::kBf16;
  codec::Codec v = codec::Codec::kBf16;

  bool operator==(const KvType&) const = default;
  std::string name() const;  // "q4", "q8/q4"
  // 16-bit bytes / bytes of whole blocks in these codecs.
  double factor(int head_dim) const;
};

// K, K,V or K/V. kInvalidArgument names what is wrong.
Expected<KvType> ParseKvType(std::string_view text);

struct KvTypeRule {
  int first_layer = 0;
  int last_layer = INT_MAX;  // this one included
  KvType type;
};

// [FIRST-LAST:]K[,V], or [LAYER:]K[,V].
Expected<KvTypeRule> ParseKvTypeRule(std::string_view text);

struct KvCodecs {
  codec::Codec written = codec::Codec::kBf16;  // by the forward pass
  std::vector<codec::Codec> sealed;            // by table (kv::TableIndex); empty: as written
};

// Of rules that name a layer the last one counts; `otherwise` where none does. kOutOfRange: a rule begins behind the
// last layer. kUnsupported: f16 or f32 together with anything else: those are what the forward pass writes, bf16 what
// is encoded.
Expected<KvCodecs> ResolveKvTypes(std::span<const KvTypeRule> rules, int n_layers, codec::Codec otherwise);

}  // namespace jointkv::engine
