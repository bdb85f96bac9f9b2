// The commands. Each Add... registers a subcommand with its options; when it is the one chosen, it sets `run`.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

namespace jointkv::cli {

using Command = std::function<int()>;  // returns the exit code

void AddServe(CLI::App& app, Command& run);
void AddGenerate(CLI::App& app, Command& run);
void AddChat(CLI::App& app, Command& run);
void AddInspect(CLI::App& app, Command& run);
void AddBench(CLI::App& app, Command& run);
void AddDemo(CLI::App& app, Command& run);
void AddEval(CLI::App& app, Command& run);
void AddAnalyze(CLI::App& app, Command& run);

// Adds the options that --config of `serve` names to the arguments, behind the command's name.
void ExpandServeConfig(std::vector<std::string>& arguments);

// Version, build, CPU targets and dependencies, one a line.
std::string VersionText();

// The program.
int Main(int argc, char** argv);

}  // namespace jointkv::cli
