#include "cli/pareto_svg.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cli/svg.h"

namespace jointkv::cli {
namespace {

constexpr int kWidth = 860;
constexpr int kHeight = 480;
constexpr double kLeft = 76;
constexpr double kRight = 610;  // the legend stands right of it
constexpr double kTop = 48;
constexpr double kBottom = 424;
constexpr double kFloor = 1e-5;  // least KL that a plot tells from 0

struct Range {
  double from = 0;
  double to = 1;
};

Range KlRange(const std::vector<ParetoSeries>& curves) {
  double least = 1e-2;
  double most = 1e-2;
  for (const ParetoSeries& curve : curves) {
    for (const ParetoPoint& point : curve.points) {
      if (!std::isfinite(point.kl) || point.kl < kFloor) continue;
      least = std::min(least, std::max(kFloor, std::min(point.kl, point.kl_min)));
      if (std::isfinite(point.kl_max)) most = std::max({most, point.kl, point.kl_max});
    }
  }
  return {std::pow(10, std::floor(std::log10(least))), std::pow(10, std::ceil(std::log10(most * 1.05)))};
}

double CompressionMost(const std::vector<ParetoSeries>& curves) {
  double most = 2;
  for (const ParetoSeries& curve : curves) {
    for (const ParetoPoint& point : curve.points) most = std::max(most, point.compression);
  }
  return most * 1.05;
}

void DrawAxes(Svg& svg, const Scale& x, const Scale& y) {
  for (const double tick : x.Ticks(8)) {
    svg.Line(x.At(tick), kTop, x.At(tick), kBottom, "grid");
    svg.Text(x.At(tick), kBottom + 18, fmt::format("x{:g}", tick), "soft", "middle");
  }
  for (const double tick : y.Ticks(12)) {
    svg.Line(kLeft, y.At(tick), kRight, y.At(tick), "grid");
    svg.Text(kLeft - 8, y.At(tick) + 4, fmt::format("{:g}", tick), "soft", "end");
  }
  svg.Line(kLeft, kBottom, kRight, kBottom, "ink");
  svg.Line(kLeft, kTop, kLeft, kBottom, "ink");
  svg.Text((kLeft + kRight) / 2, kBottom + 42, "16-bit bytes of the resident tokens / bytes held", "ink-text",
           "middle");
  svg.Text(22, (kTop + kBottom) / 2, "mean KL to the exact cache, nats per token", "ink-text", "middle", true);
}

}  // namespace

std::string ParetoSvg(std::string_view title, const std::vector<ParetoSeries>& curves) {
  Svg svg(kWidth, kHeight, title);
  const Range kl = KlRange(curves);
  const Scale x(0.5, CompressionMost(curves), false, kLeft, kRight);
  const Scale y(kl.from, kl.to, true, kBottom, kTop);
  DrawAxes(svg, x, y);
  for (size_t i = 0; i < curves.size(); ++i) {
    const size_t color = i % kSvgColors;
    const std::string stroke = fmt::format("c{}", color);
    const std::string fill = fmt::format("f{}", color);
    std::vector<ParetoPoint> points = curves[i].points;
    std::ranges::sort(points, {}, &ParetoPoint::compression);
    std::vector<std::pair<double, double>> path;
    for (const ParetoPoint& point : points) path.emplace_back(x.At(point.compression), y.At(point.kl));
    if (path.size() > 1) svg.Path(path, stroke);
    for (size_t j = 0; j < points.size(); ++j) {
      const auto& [px, py] = path[j];
      svg.Line(px, y.At(points[j].kl_min), px, y.At(points[j].kl_max), stroke);
      svg.Circle(px, py, 3.5, fill);
      svg.Text(px + 6, py - 6, points[j].label, "soft", "start");
    }
    const double row = kTop + 12 + 20 * static_cast<double>(i);
    svg.Rect(kRight + 24, row - 9, 11, 11, fill);
    svg.Text(kRight + 42, row + 1, curves[i].name, "ink-text", "start");
  }
  return svg.Finish();
}

}  // namespace jointkv::cli
