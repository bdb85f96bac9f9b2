// Encoding and decoding of one head of 32 tokens, K or V, with a mean. Heads rotate among more than the caches nearest
// to a core hold, as the blocks of a step do.
#include <cstring>
#include <random>
#include <vector>

#include <benchmark/benchmark.h>

#include "codec/quantised.h"

namespace jointkv::bench {
namespace {

using codec::BlockLayout;
using codec::Codec;
using codec::Kind;

constexpr int kCap = codec::kBlockTokensMax;

// state: codec, kind, head_dim, megabytes of quantised blocks.
struct Blocks {
  explicit Blocks(const benchmark::State& state)
      : to(static_cast<Codec>(state.range(0))),
        kind(static_cast<Kind>(state.range(1))),
        plain{1, static_cast<int>(state.range(2)), Codec::kBf16},
        block_bytes(BlockLayout{1, plain.head_dim, to}.block_bytes(kCap)),
        n((state.range(3) << 20) / block_bytes + 1),
        source(plain.block_bytes(kCap)),
        mean(source.size()),
        decoded(source.size()),
        quantised(n * block_bytes) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::vector<std::byte>* block : {&source, &mean}) {
      for (size_t i = 0; i < block->size(); i += 2) {
        const uint16_t value = codec::Bf16FromF32(normal(random));
        std::memcpy(block->data() + i, &value, 2);
      }
    }
    for (size_t i = 0; i < n; ++i)
      codec::EncodeBlock(plain, kind, to, source.data(), kCap, kCap, {mean.data()}, quantised.data() + i * block_bytes);
  }

  Codec to;
  Kind kind;
  BlockLayout plain;
  size_t block_bytes;
  size_t n;
  std::vector<std::byte> source;
  std::vector<std::byte> mean;
  std::vector<std::byte> decoded;
  std::vector<std::byte> quantised;
};

void Label(benchmark::State& state, const Blocks& blocks) {
  state.SetLabel(std::string(codec::CodecName(blocks.to)) + (blocks.kind == Kind::kK ? " K" : " V"));
}

void Decode(benchmark::State& state) {
  Blocks blocks(state);
  size_t at = 0;
  for (auto _ : state) {
    codec::DecodeHead(blocks.plain, blocks.kind, blocks.to, blocks.quantised.data() + at * blocks.block_bytes, 0, kCap,
                      kCap, {blocks.mean.data()}, blocks.decoded.data());
    benchmark::ClobberMemory();
    at = at + 1 == blocks.n ? 0 : at + 1;
  }
  Label(state, blocks);
}

void Encode(benchmark::State& state) {
  Blocks blocks(state);
  for (auto _ : state) {
    codec::EncodeBlock(blocks.plain, blocks.kind, blocks.to, blocks.source.data(), kCap, kCap, {blocks.mean.data()},
                       blocks.quantised.data());
    benchmark::ClobberMemory();
  }
  Label(state, blocks);
}

const std::vector<int64_t> kCodecs = {static_cast<int64_t>(Codec::kQ8), static_cast<int64_t>(Codec::kQ4),
                                      static_cast<int64_t>(Codec::kQ2), static_cast<int64_t>(Codec::kQ1)};

BENCHMARK(Decode)->ArgNames({"codec", "kind", "dim", "mb"})->ArgsProduct({kCodecs, {0, 1}, {64, 128, 256}, {0, 8}});
BENCHMARK(Encode)->ArgNames({"codec", "kind", "dim", "mb"})->ArgsProduct({kCodecs, {0, 1}, {64, 128, 256}, {0}});

}  // namespace
}  // namespace jointkv::bench

BENCHMARK_MAIN();
