#include "cli/help_groups.h"

namespace jointkv::cli {

void SetGroup(CLI::App& command, const char* title) { command.option_defaults()->group(title); }

void PutHelpLast(CLI::App& command) {
  SetGroup(command, "Help");
  command.set_help_flag("-h,--help", "print this and exit");
}

}  // namespace jointkv::cli
