// The command line's --seed.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>

namespace jointkv::cli {

// The library would take a negative number, and one beyond 64 bits, for some other seed.
void AddSeedFlag(CLI::App& app, uint64_t& seed, const char* help);
void AddSeedFlag(CLI::App& app, std::optional<uint64_t>& seed, const char* help);

}  // namespace jointkv::cli
