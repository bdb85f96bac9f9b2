#include "cli/analyze_report.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "cli/svg.h"

namespace jointkv::cli {
namespace {

using codec::Kind;
using Json = nlohmann::ordered_json;

Json DistributionJson(const Distribution& d, const char* accepted) {
  return {{"pairs", d.pairs}, {"p05", d.p05}, {"p25", d.p25},        {"p50", d.p50},
          {"p75", d.p75},     {"p95", d.p95}, {accepted, d.accepted}};
}

Json PairJson(const EqualAndRandom& pair, const char* accepted) {
  return {{"equal", DistributionJson(pair.equal, accepted)}, {"random", DistributionJson(pair.random, accepted)}};
}

const char* KindName(Kind kind) { return kind == Kind::kK ? "K" : "V"; }

struct Panel {
  std::string title;
  Kind kind = Kind::kK;
  EqualAndRandom LayerAnalysis::*figures = nullptr;
  bool logarithmic = false;
  double mark = 0;  // where the policy's test stands
  std::string mark_name;
};

std::vector<Panel> Panels(const AnalysisOptions& options) {
  const std::string budget = fmt::format("budget {}", options.budget);
  const std::string threshold = fmt::format("threshold {}", options.threshold);
  return {{"NMSE of keys, rotated by their offset in the block", Kind::kK, &LayerAnalysis::nmse, true, options.budget,
           budget},
          {"NMSE of values", Kind::kV, &LayerAnalysis::nmse, true, options.budget, budget},
          {"Cosine of keys, rotated by their position: absolute RoPE", Kind::kK, &LayerAnalysis::cosine_absolute, false,
           options.threshold, threshold},
          {"Cosine of keys, rotated by their offset: absolute RoPE sees this of two blocks at one position", Kind::kK,
           &LayerAnalysis::cosine, false, options.threshold, threshold},
          {"Cosine of values", Kind::kV, &LayerAnalysis::cosine, false, options.threshold, threshold}};
}

constexpr int kWidth = 940;
constexpr int kPanelHeight = 250;
constexpr int kHead = 64;
constexpr double kLeft = 64;
constexpr double kRight = 822;

void DrawBox(Svg& svg, const Scale& y, double x, double width, const Distribution& d, int color) {
  if (d.pairs == 0) return;
  const std::string stroke = fmt::format("c{}", color);
  const double middle = x + width / 2;
  svg.Line(middle, y.At(d.p05), middle, y.At(d.p25), stroke);
  svg.Line(middle, y.At(d.p75), middle, y.At(d.p95), stroke);
  svg.Rect(x, y.At(d.p75), width, std::max(1.0, y.At(d.p25) - y.At(d.p75)), fmt::format("f{} box", color));
  svg.Line(x, y.At(d.p50), x + width, y.At(d.p50), stroke);
}

// The values that a panel has to show.
std::pair<double, double> RangeOf(const Panel& panel, const std::vector<const LayerAnalysis*>& layers) {
  double least = panel.mark;
  double most = panel.mark;
  for (const LayerAnalysis* layer : layers) {
    for (const Distribution* d : {&(layer->*panel.figures).equal, &(layer->*panel.figures).random}) {
      if (d->pairs == 0) continue;
      least = std::min(least, d->p05);
      most = std::max(most, d->p95);
    }
  }
  if (!panel.logarithmic) return {std::floor(least * 10) / 10, 1};
  // A layer in which equal tokens are equal, as the first one, has 0.
  return {std::pow(10, std::floor(std::log10(std::clamp(least, 1e-4, 1e-1)))), std::max(1.0, most) * 1.2};
}

void DrawPanel(Svg& svg, const Panel& panel, const std::vector<const LayerAnalysis*>& layers, double top) {
  const double bottom = top + kPanelHeight - 66;
  const auto [from, to] = RangeOf(panel, layers);
  const Scale y(from, to, panel.logarithmic, bottom, top);
  svg.Text(kLeft, top - 8, panel.title, "name", "start");
  for (const double tick : y.Ticks(6)) {
    svg.Line(kLeft, y.At(tick), kRight, y.At(tick), "grid");
    svg.Text(kLeft - 8, y.At(tick) + 4, fmt::format("{:g}", std::round(tick * 1e6) / 1e6 + 0.0), "soft", "end");
  }
  const double slot = (kRight - kLeft) / static_cast<double>(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const double x = kLeft + slot * static_cast<double>(i);
    const EqualAndRandom& figures = layers[i]->*panel.figures;
    DrawBox(svg, y, x + slot * 0.12, slot * 0.32, figures.equal, 0);
    DrawBox(svg, y, x + slot * 0.54, slot * 0.32, figures.random, 1);
    const bool numbered = layers.size() <= 16 || i % 2 == 0;
    if (numbered) svg.Text(x + slot / 2, bottom + 16, std::to_string(layers[i]->layer), "soft", "middle");
  }
  svg.Line(kLeft, y.At(panel.mark), kRight, y.At(panel.mark), "mark");
  svg.Text(kRight + 6, y.At(panel.mark) + 4, panel.mark_name, "soft", "start");
  svg.Line(kLeft, bottom, kRight, bottom, "ink");
  svg.Line(kLeft, top, kLeft, bottom, "ink");
  svg.Text((kLeft + kRight) / 2, bottom + 32, "layer", "soft", "middle");
}

std::vector<const LayerAnalysis*> LayersOf(const Analysis& analysis, Kind kind) {
  std::vector<const LayerAnalysis*> layers;
  for (const LayerAnalysis& layer : analysis.layers) {
    if (layer.kind == kind) layers.push_back(&layer);
  }
  return layers;
}

std::string TableRow(const LayerAnalysis& k, const LayerAnalysis& v) {
  const auto nmse = [](const Distribution& d) {
    return d.pairs == 0 ? std::string("-") : fmt::format("{:.3f} ({:.3f})", d.p50, d.p95);
  };
  const auto cosine = [](const Distribution& d) {
    return d.pairs == 0 ? std::string("-") : fmt::format("{:.2f} {:>3.0f} %", d.p50, 100 * d.accepted);
  };
  const auto median = [](const Distribution& d) {
    return d.pairs == 0 ? std::string("-") : fmt::format("{:.2f}", d.p50);
  };
  return fmt::format("{:>5}{:>16}{:>8}{:>16}{:>8}{:>13}{:>13}{:>13}{:>13}\n", k.layer, nmse(k.nmse.equal),
                     median(k.nmse.random), nmse(v.nmse.equal), median(v.nmse.random), cosine(k.cosine_absolute.equal),
                     cosine(k.cosine_absolute.random), cosine(k.cosine.equal), cosine(k.cosine.random));
}

}  // namespace

nlohmann::ordered_json ToJson(const AnalysisContext& context, const Analysis& analysis) {
  Json json = {{"engine", "jointkv"},
               {"version", JOINTKV_VERSION},
               {"model", context.model},
               {"docs", context.docs.empty() ? Json() : Json(context.docs)},
               {"requests", context.requests},
               {"blocks", analysis.blocks},
               {"equal_pairs", analysis.equal_pairs},
               {"budget", std::stod(fmt::format("{}", context.options.budget))},
               {"threshold", std::stod(fmt::format("{}", context.options.threshold))},
               {"results", Json::array()}};
  for (const LayerAnalysis& layer : analysis.layers) {
    json["results"].push_back({{"layer", layer.layer},
                               {"kind", KindName(layer.kind)},
                               {"nmse", PairJson(layer.nmse, "within_budget")},
                               {"cosine", PairJson(layer.cosine, "above_threshold")},
                               {"cosine_absolute", PairJson(layer.cosine_absolute, "above_threshold")}});
  }
  return json;
}

std::string ToTable(const AnalysisContext& context, const Analysis& analysis, bool all_layers) {
  const std::vector<const LayerAnalysis*> keys = LayersOf(analysis, Kind::kK);
  const std::vector<const LayerAnalysis*> values = LayersOf(analysis, Kind::kV);
  std::string table = fmt::format(
      "{} prompts, {} blocks, {} pairs with equal tokens at different positions\n\n"
      "NMSE: median (95 %) of equal pairs, median of random pairs. Cosine: median, and how many reach {}.\n\n"
      "{:>5}{:>24}{:>24}{:>26}{:>26}\n{:>5}{:>16}{:>8}{:>16}{:>8}{:>13}{:>13}{:>13}{:>13}\n",
      context.requests, analysis.blocks, analysis.equal_pairs, context.options.threshold, "", "NMSE of K", "NMSE of V",
      "cosine of K by position", "cosine of K by offset", "layer", "equal", "random", "equal", "random", "equal",
      "random", "equal", "random");
  constexpr size_t kRows = 8;
  const size_t step = all_layers ? 1 : std::max<size_t>(1, (keys.size() + kRows - 1) / kRows);
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i % step == 0 || i + 1 == keys.size()) table += TableRow(*keys[i], *values[i]);
  }
  return table;
}

std::string ToSvg(const AnalysisContext& context, const Analysis& analysis) {
  const std::vector<Panel> panels = Panels(context.options);
  Svg svg(kWidth, kHead + kPanelHeight * static_cast<int>(panels.size()), "Blocks with equal tokens, and random ones");
  svg.Rect(kLeft, 36, 11, 11, "f0");
  svg.Text(kLeft + 17, 46, "equal tokens at different positions", "name", "start");
  svg.Rect(kLeft + 300, 36, 11, 11, "f1");
  svg.Text(kLeft + 317, 46, "random tokens; boxes: quartiles, whiskers: 5 and 95 %", "name", "start");
  double top = kHead + 24;
  for (const Panel& panel : panels) {
    DrawPanel(svg, panel, LayersOf(analysis, panel.kind), top);
    top += kPanelHeight;
  }
  return svg.Finish();
}

}  // namespace jointkv::cli
