// --chat-template FILE: a Jinja template instead of the model file's own.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

namespace jointkv::cli {

// `source` becomes the file's text.
void AddChatTemplateFlag(CLI::App& app, std::string& source);

}  // namespace jointkv::cli
