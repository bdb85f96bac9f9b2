#include "cli/svg.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/check.h"

namespace jointkv::cli {
namespace {

struct Shades {
  std::string_view light;
  std::string_view dark;
};

// Told apart also by those who do not see red and green apart (after Okabe and Ito).
constexpr std::array<Shades, kSvgColors> kSeries = {{{"#0072b2", "#56b4e9"},
                                                     {"#d55e00", "#f08a3c"},
                                                     {"#008a63", "#2fc79a"},
                                                     {"#b0568f", "#dd8fc0"},
                                                     {"#8a6d00", "#e0c040"},
                                                     {"#4a5bd0", "#98a4ff"},
                                                     {"#7a4a2b", "#c99a78"},
                                                     {"#5c6670", "#a9b4be"}}};

std::string Style() {
  std::string light;
  std::string dark;
  std::string classes;
  for (int i = 0; i < kSvgColors; ++i) {
    light += fmt::format("--s{}:{};", i, kSeries[static_cast<size_t>(i)].light);
    dark += fmt::format("--s{}:{};", i, kSeries[static_cast<size_t>(i)].dark);
    classes += fmt::format(".c{0}{{stroke:var(--s{0});fill:none}}.f{0}{{fill:var(--s{0})}}", i);
  }
  return "<style>svg{--paper:#fff;--ink:#1b1f24;--soft:#5a636d;--grid:#e2e6ea;" + light +
         "}@media(prefers-color-scheme:dark){svg{--paper:#14181d;--ink:#e8ecf0;--soft:#9aa5b1;--grid:#2b323a;" + dark +
         "}}text{font:12px system-ui,sans-serif;fill:var(--ink)}text.soft{fill:var(--soft)}"
         "text.title{font-size:15px;font-weight:600}.paper{fill:var(--paper)}.ink{stroke:var(--ink);fill:none}"
         ".grid{stroke:var(--grid);fill:none}.mark{stroke:var(--soft);stroke-dasharray:4 3;fill:none}"
         "path,line{stroke-width:1.5}.grid{stroke-width:1}.box{fill-opacity:.35}" +
         classes + "</style>\n";
}

std::string Number(double value) { return fmt::format("{:.1f}", std::isfinite(value) ? value : 0.0); }

}  // namespace

std::string EscapeXml(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&': escaped += "&amp;"; break;
      case '<': escaped += "&lt;"; break;
      case '>': escaped += "&gt;"; break;
      case '"': escaped += "&quot;"; break;
      case '\'': escaped += "&apos;"; break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) escaped += c;  // no others may stand in XML
    }
  }
  return escaped;
}

Svg::Svg(int width, int height, std::string_view title)
    : text_(
          fmt::format("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
                      "role=\"img\">\n<title>{2}</title>\n",
                      width, height, EscapeXml(title)) +
          Style()) {
  Rect(0, 0, width, height, "paper");
  Text(16, 24, title, "title", "start");
}

void Svg::Line(double x1, double y1, double x2, double y2, std::string_view css_class) {
  text_ += fmt::format("<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" class=\"{}\"/>\n", Number(x1), Number(y1),
                       Number(x2), Number(y2), EscapeXml(css_class));
}

void Svg::Path(const std::vector<std::pair<double, double>>& points, std::string_view css_class) {
  std::string data;
  for (const auto& [x, y] : points) data += fmt::format("{}{} {}", data.empty() ? "M" : "L", Number(x), Number(y));
  text_ += fmt::format("<path d=\"{}\" class=\"{}\"/>\n", data, EscapeXml(css_class));
}

void Svg::Circle(double x, double y, double radius, std::string_view css_class) {
  text_ += fmt::format("<circle cx=\"{}\" cy=\"{}\" r=\"{}\" class=\"{}\"/>\n", Number(x), Number(y), Number(radius),
                       EscapeXml(css_class));
}

void Svg::Rect(double x, double y, double width, double height, std::string_view css_class) {
  text_ += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" class=\"{}\"/>\n", Number(x), Number(y),
                       Number(std::max(0.0, width)), Number(std::max(0.0, height)), EscapeXml(css_class));
}

void Svg::Text(double x, double y, std::string_view text, std::string_view css_class, std::string_view anchor,
               bool turned) {
  const std::string turn = turned ? fmt::format(" transform=\"rotate(-90 {} {})\"", Number(x), Number(y)) : "";
  text_ += fmt::format("<text x=\"{}\" y=\"{}\" class=\"{}\" text-anchor=\"{}\"{}>{}</text>\n", Number(x), Number(y),
                       EscapeXml(css_class), EscapeXml(anchor), turn, EscapeXml(text));
}

std::string Svg::Finish() const { return text_ + "</svg>\n"; }

Scale::Scale(double from, double to, bool logarithmic, double pixels_from, double pixels_to)
    : from_(from), to_(to), logarithmic_(logarithmic), pixels_from_(pixels_from), pixels_to_(pixels_to) {
  CHECK(from < to && (!logarithmic || from > 0));
}

double Scale::Position(double value) const {
  return logarithmic_ ? std::log(value / from_) / std::log(to_ / from_) : (value - from_) / (to_ - from_);
}

double Scale::At(double value) const {
  return std::lerp(pixels_from_, pixels_to_, Position(std::clamp(value, from_, to_)));
}

std::vector<double> Scale::Ticks(int wanted) const {
  std::vector<double> ticks;
  if (logarithmic_) {
    const double decades = std::log10(to_ / from_);
    for (double ten = std::pow(10, std::floor(std::log10(from_))); ten <= to_ * 1.0001; ten *= 10) {
      for (const double digit : {1.0, 2.0, 5.0}) {
        const bool dense = decades * 3 <= wanted;
        const double tick = digit * ten;
        if ((digit == 1 || dense) && tick >= from_ * 0.9999 && tick <= to_ * 1.0001) ticks.push_back(tick);
      }
    }
    return ticks;
  }
  const double rough = (to_ - from_) / std::max(1, wanted);
  const double ten = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * ten;
  for (const double digit : {5.0, 2.0, 1.0}) {
    if (digit * ten >= rough * 0.9999) step = digit * ten;
  }
  for (double i = std::ceil(from_ / step - 1e-9); i * step <= to_ + step * 1e-9; ++i) ticks.push_back(i * step);
  return ticks;
}

}  // namespace jointkv::cli
