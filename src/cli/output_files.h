// Looks at the files of a command before its work begins, which may take an hour.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"

namespace jointkv::cli {

// A file and the option that names it; "-" is standard input or output, an empty path no file.
struct NamedFile {
  const char* flag;
  std::string path;
};

// kInvalidArgument when an output is also an input or another output, through whatever links; kNotFound or kIo when it
// cannot be written. Creates nothing.
Status CheckOutputs(const std::vector<NamedFile>& inputs, const std::vector<NamedFile>& outputs);

}  // namespace jointkv::cli
