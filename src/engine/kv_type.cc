#include "engine/kv_type.h"

#include <algorithm>
#include <charconv>

#include "codec/layout.h"

namespace jointkv::engine {
namespace {

using codec::Codec;

Status Bad(std::string_view text, const std::string& what) {
  return {StatusCode::kInvalidArgument, "kv-type '" + std::string(text) + "': " + what};
}

bool ParseLayer(std::string_view text, int& layer) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), layer);
  return error == std::errc() && end == text.data() + text.size() && layer >= 0;
}

}  // namespace

std::string KvType::name() const {
  return k == v ? codec::CodecName(k) : std::string(codec::CodecName(k)) + "/" + codec::CodecName(v);
}

double KvType::factor(int head_dim) const {
  const auto bytes = [head_dim](Codec codec) {
    return static_cast<double>(codec::BlockLayout{1, head_dim, codec}.head_bytes(codec::kBlockTokensMax));
  };
  return 2 * bytes(Codec::kBf16) / (bytes(k) + bytes(v));
}

Expected<KvType> ParseKvType(std::string_view text) {
  const size_t cut = text.find_first_of(",/");
  const auto k = codec::ParseCodec(text.substr(0, cut));
  const auto v = cut == std::string_view::npos ? k : codec::ParseCodec(text.substr(cut + 1));
  if (!k.has_value() || !v.has_value()) return Bad(text, "must be K or K,V, each one of bf16, f16, f32, q8, q4");
  return KvType{*k, *v};
}

Expected<KvTypeRule> ParseKvTypeRule(std::string_view text) {
  KvTypeRule rule;
  std::string_view type = text;
  if (const size_t colon = text.find(':'); colon != std::string_view::npos) {
    const std::string_view layers = text.substr(0, colon);
    type = text.substr(colon + 1);
    const size_t dash = layers.find('-');
    const std::string_view last = dash == std::string_view::npos ? layers : layers.substr(dash + 1);
    if (!ParseLayer(layers.substr(0, dash), rule.first_layer) || !ParseLayer(last, rule.last_layer)) {
      return Bad(text, "layers must be FIRST-LAST or one number, from 0 on");
    }
    if (rule.last_layer < rule.first_layer) return Bad(text, "the last layer comes before the first");
  }
  ASSIGN_OR_RETURN(rule.type, ParseKvType(type));
  return rule;
}

Expected<KvCodecs> ResolveKvTypes(std::span<const KvTypeRule> rules, int n_layers, Codec otherwise) {
  std::vector<Codec> tables(2 * n_layers, otherwise);
  for (const KvTypeRule& rule : rules) {
    if (rule.first_layer >= n_layers) {
      return Status(StatusCode::kOutOfRange, "kv-type: layer " + std::to_string(rule.first_layer) +
                                                 " is not one of the model's " + std::to_string(n_layers));
    }
    for (int layer = rule.first_layer; layer <= std::min(rule.last_layer, n_layers - 1); ++layer) {
      tables[2 * layer] = rule.type.k;
      tables[2 * layer + 1] = rule.type.v;
    }
  }
  KvCodecs codecs;
  for (const Codec codec : tables) {
    if (!codec::IsQuantised(codec)) codecs.written = codec;
  }
  bool quantised = false;
  for (const Codec codec : tables) {
    quantised = quantised || codec::IsQuantised(codec);
    if (codec == codecs.written || (codecs.written == Codec::kBf16 && codec::IsQuantised(codec))) continue;
    return Status(StatusCode::kUnsupported, std::string("kv-type ") + codec::CodecName(codecs.written) +
                                                ": cannot be used together with " + codec::CodecName(codec));
  }
  if (quantised) codecs.sealed = std::move(tables);
  return codecs;
}

}  // namespace jointkv::engine
