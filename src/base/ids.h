// Strong integer ids: a block id cannot be passed where a sequence id is meant.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace jointkv {

template <typename Tag>
struct Id {
  int32_t value = -1;

  constexpr Id() = default;
  constexpr explicit Id(int32_t v) : value(v) {}
  constexpr bool valid() const { return value >= 0; }
  constexpr size_t index() const { return static_cast<size_t>(value); }
  friend constexpr auto operator<=>(Id, Id) = default;
};

using BlockId = Id<struct BlockTag>;        // a physical KV block
using SequenceId = Id<struct SequenceTag>;  // one token sequence with a block table
using LayerId = Id<struct LayerTag>;
using DomainId = Id<struct DomainTag>;  // fusion and prefix-cache domain: one tenant or trust group
using TokenId = int32_t;                // as in every tokenizer's own interface

}  // namespace jointkv

template <typename Tag>
struct std::hash<jointkv::Id<Tag>> {
  size_t operator()(jointkv::Id<Tag> id) const noexcept { return std::hash<int32_t>()(id.value); }
};
