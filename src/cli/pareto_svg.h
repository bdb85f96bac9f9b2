// Compression against quality: one curve for each way of saving bytes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace jointkv::cli {

struct ParetoPoint {
  double compression = 1;
  double kl = 0;
  double kl_min = 0;  // over the seeds
  double kl_max = 0;
  std::string label;  // the setting
};

struct ParetoSeries {
  std::string name;
  std::vector<ParetoPoint> points;
};

// KL on a logarithmic axis; what lies below its lower end (an exact cache has 0) stands on the edge.
std::string ParetoSvg(std::string_view title, const std::vector<ParetoSeries>& curves);

}  // namespace jointkv::cli
