#include "base/bytes.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>

namespace jointkv {

Expected<size_t> ParseBytes(std::string_view text) {
  const auto bad = [&] {
    return Status(
        StatusCode::kInvalidArgument,
        "size '" + std::string(text) + "': expected a number with an optional suffix K, M, G or T, such as 512M");
  };
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || !(number >= 0)) return bad();
  std::string suffix;
  for (const char* c = end; c != text.data() + text.size(); ++c) {
    if (*c != ' ') suffix += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
  }
  if (suffix.size() > 1 && suffix.back() == 'B') suffix.pop_back();
  if (suffix.size() == 2 && suffix.back() == 'I') suffix.pop_back();
  double unit = 1;
  if (suffix.size() > 1) return bad();
  if (suffix.size() == 1) {
    switch (suffix[0]) {
      case 'B': break;
      case 'K': unit = 0x1p10; break;
      case 'M': unit = 0x1p20; break;
      case 'G': unit = 0x1p30; break;
      case 'T': unit = 0x1p40; break;
      default: return bad();
    }
  }
  const double bytes = number * unit;
  if (!(bytes < 0x1p62))
    return Status(StatusCode::kOutOfRange, "size '" + std::string(text) + "': larger than 2^62 bytes");
  return static_cast<size_t>(std::llround(bytes));
}

std::string FormatBytes(size_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return text.data();
}

size_t AvailableMemoryBytes() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  size_t kib = 0;
  std::string unit;
  while (file >> key >> kib >> unit) {
    if (key == "MemAvailable:")
      return std::min(kib * 1024, ControlGroupBytesLeft("/sys/fs/cgroup", "/proc/self/cgroup"));
  }
  return 0;
}

size_t ControlGroupBytesLeft(const std::string& root, const std::string& membership) {
  size_t left = SIZE_MAX;
  // The line of version 2 is "0::/path"; inside a container the path is often just "/".
  std::ifstream lines(membership);
  std::string group;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("0::/")) group = line.substr(3);
  }
  if (group.empty()) return left;
  while (true) {
    size_t most = 0;
    size_t used = 0;
    std::ifstream max_file(root + group + "/memory.max");
    std::ifstream current_file(root + group + "/memory.current");
    // "max" for no limit is no number.
    if (max_file >> most && current_file >> used) left = std::min(left, most - std::min(most, used));
    if (group.size() <= 1) return left;
    group.resize(std::max<size_t>(1, group.rfind('/')));
  }
}

size_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  size_t total_pages = 0;
  size_t resident_pages = 0;
  if (!(file >> total_pages >> resident_pages)) return 0;
  return resident_pages * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace jointkv
