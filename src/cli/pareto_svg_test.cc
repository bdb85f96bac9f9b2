#include "cli/pareto_svg.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cli/svg.h"
#include "cli/xml_check_for_test.h"

namespace jointkv::cli {
namespace {

TEST(ParetoSvgTest, IsWellFormedAndHasTheNames) {
  const std::string svg =
      ParetoSvg("a < b & \"c\"", {{"bounded <1>", {{4.5, 0.02, 0.01, 0.03, "0.1"}, {2, 0.001, 0.001, 0.002, "0.03"}}},
                                  {"off", {{1, 0, 0, 0, ""}}}});
  EXPECT_EQ(XmlError(svg), "");
  EXPECT_NE(svg.find("<title>a &lt; b &amp; &quot;c&quot;</title>"), std::string::npos);
  EXPECT_NE(svg.find("bounded &lt;1&gt;"), std::string::npos);
  EXPECT_NE(svg.find("prefers-color-scheme"), std::string::npos);
  EXPECT_EQ(svg.find("href"), std::string::npos);
}

TEST(ParetoSvgTest, StandsNothingAndWhatIsNotFinite) {
  EXPECT_EQ(XmlError(ParetoSvg("", {})), "");
  const double inf = std::numeric_limits<double>::infinity();
  const std::string svg = ParetoSvg("t", {{"s", {{3, inf, 0, inf, "x"}, {2, std::nan(""), 0, 0, "y"}}}});
  EXPECT_EQ(XmlError(svg), "");
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
}

TEST(SvgTest, XmlErrorsAreFound) {
  EXPECT_EQ(XmlError("<a><b c=\"d\"/>e</a>"), "");
  EXPECT_NE(XmlError("<a><b></a></b>"), "");
  EXPECT_NE(XmlError("<a>&x</a>"), "");
  EXPECT_NE(XmlError("<a b=c/>"), "");
  EXPECT_NE(XmlError("<a>"), "");
}

TEST(ScaleTest, MapsBothKinds) {
  const Scale linear(0, 10, false, 100, 200);
  EXPECT_DOUBLE_EQ(linear.At(2.5), 125);
  EXPECT_DOUBLE_EQ(linear.At(99), 200);
  const Scale logarithmic(0.001, 1, true, 300, 0);
  EXPECT_DOUBLE_EQ(logarithmic.At(0.01), 200);
  EXPECT_DOUBLE_EQ(logarithmic.At(0), 300);
}

TEST(ScaleTest, TicksAreRoundNumbers) {
  EXPECT_EQ(Scale(0, 10, false, 0, 1).Ticks(5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(Scale(0.5, 5.2, false, 0, 1).Ticks(5), (std::vector<double>{1, 2, 3, 4, 5}));
  const std::vector<double> decades = Scale(1e-3, 1, true, 0, 1).Ticks(4);
  ASSERT_EQ(decades.size(), 4U);
  EXPECT_NEAR(decades[1], 0.01, 1e-12);
  EXPECT_EQ(Scale(1e-3, 1, true, 0, 1).Ticks(12).size(), 10U);
}

}  // namespace
}  // namespace jointkv::cli
