// --chat-template FILE: a Jinja template instead of the model file's own.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

namespace jointkv::cli {

// `source` becomes the file's text, and `path` where it lies.
void AddChatTemplateFlag(CLI::App& app, std::string& source, std::string* path = nullptr);

}  // namespace jointkv::cli
