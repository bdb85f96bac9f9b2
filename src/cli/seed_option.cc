#include "cli/seed_option.h"

#include <charconv>
#include <limits>
#include <string>

namespace jointkv::cli {
namespace {

std::string CheckSeed(const std::string& text) {
  uint64_t seed = 0;
  const char* end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, seed);
  if (read.ec == std::errc() && read.ptr == end) return "";
  return "'" + text + "' is not a whole number from 0 to " + std::to_string(std::numeric_limits<uint64_t>::max());
}

template <typename Seed>
CLI::Option* Add(CLI::App& app, Seed& seed, const char* help) {
  return app.add_option("--seed", seed, help)->check(CheckSeed)->type_name("N");
}

}  // namespace

void AddSeedFlag(CLI::App& app, uint64_t& seed, const char* help) { Add(app, seed, help)->capture_default_str(); }

void AddSeedFlag(CLI::App& app, std::optional<uint64_t>& seed, const char* help) {
  Add(app, seed, help)->default_str("random");
}

}  // namespace jointkv::cli
