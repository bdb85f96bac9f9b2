#include <algorithm>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "dense/targets.h"

namespace jointkv::cli {

int Main(int argc, char** argv) {
  if (const Status status = dense::ApplyForcedTarget(); !status.ok()) {
    Complain(status.message());
    return kExitUsage;
  }
  Command run;
  CLI::App app("LLM inference on the CPU over a KV cache of shared blocks.", "jointkv");
  app.require_subcommand(1);
  app.set_version_flag("--version", VersionText);
  AddServe(app, run);
  AddGenerate(app, run);
  AddChat(app, run);
  AddInspect(app, run);
  AddBench(app, run);
  AddDemo(app, run);
  AddEval(app, run);
  AddAnalyze(app, run);
  try {
    std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
    ExpandServeConfig(arguments);
    std::ranges::reverse(arguments);  // as the library wants it
    app.parse(std::move(arguments));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // help or version, on stdout
    const std::vector<std::string> unknown =
        app.get_subcommands().empty() ? app.remaining() : std::vector<std::string>();
    const std::string what = unknown.empty() ? error.what() : "there is no command '" + unknown.front() + "'";
    Complain(what + " (--help lists what there is)");
    return kExitUsage;
  }
  try {
    return run();
  } catch (const std::exception& error) {
    Complain(error.what());
    return kExitFailed;
  }
}

}  // namespace jointkv::cli
