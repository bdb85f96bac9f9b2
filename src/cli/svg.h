// A picture as SVG text, drawn by hand: follows the reader's light or dark setting, needs nothing from outside.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace jointkv::cli {

inline constexpr int kSvgColors = 8;

std::string EscapeXml(std::string_view text);

// Svg. Threads: one. Owns: the text so far. Fails how: never; coordinates that are not finite are drawn as 0.
// Classes of shapes: "ink", "soft", "grid", "mark", and "c0" to "c7" (stroke) or "f0" to "f7" (fill) for series.
class Svg {
 public:
  Svg(int width, int height, std::string_view title);

  void Line(double x1, double y1, double x2, double y2, std::string_view css_class);
  void Path(const std::vector<std::pair<double, double>>& points, std::string_view css_class);
  void Circle(double x, double y, double radius, std::string_view css_class);
  void Rect(double x, double y, double width, double height, std::string_view css_class);
  // anchor: start, middle or end; `turned`: read from bottom to top.
  void Text(double x, double y, std::string_view text, std::string_view css_class, std::string_view anchor,
            bool turned = false);

  std::string Finish() const;

 private:
  std::string text_;
};

// A linear or logarithmic scale from values to pixels.
class Scale {
 public:
  // pixels_from may be above pixels_to (an upward axis). A logarithmic scale needs values above 0.
  Scale(double from, double to, bool logarithmic, double pixels_from, double pixels_to);

  // Values outside land on the edge.
  double At(double value) const;
  // Round numbers inside the scale, about `wanted` of them.
  std::vector<double> Ticks(int wanted) const;

 private:
  double Position(double value) const;

  double from_;
  double to_;
  bool logarithmic_;
  double pixels_from_;
  double pixels_to_;
};

}  // namespace jointkv::cli
