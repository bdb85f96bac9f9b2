#include "cli/commands.h"
namespace jointkv::cli {
void AddChat(CLI::App&, Command&) {}
void AddInspect(CLI::App&, Command&) {}
void AddDemo(CLI::App&, Command&) {}
}
