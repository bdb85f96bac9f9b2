// The order of --help: options under titles, what is needed first on top.
#pragma once

#include <CLI/CLI.hpp>

namespace jointkv::cli {

// Options added from now on are listed under this title.
void SetGroup(CLI::App& command, const char* title);

// --help itself comes last.
void PutHelpLast(CLI::App& command);

}  // namespace jointkv::cli
