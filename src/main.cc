#include "cli/commands.h"

int main(int argc, char** argv) { return jointkv::cli::Main(argc, argv); }
