#include "cli/chat_template_option.h"

#include <cerrno>
#include <cstring>
#include <fstream>

namespace jointkv::cli {
namespace {

constexpr size_t kBytesMax = size_t{1} << 20;

}  // namespace

void AddChatTemplateFlag(CLI::App& app, std::string& source, std::string* path) {
  const char* flag = "--chat-template";
  const auto read = [&source, path, flag](const std::string& given) {
    std::ifstream file(given, std::ios::binary);
    std::string text(kBytesMax + 1, '\0');
    if (!file || !(file.read(text.data(), static_cast<std::streamsize>(text.size())) || file.eof())) {
      throw CLI::ValidationError(flag, "'" + given + "' cannot be read: " + std::strerror(errno));
    }
    text.resize(static_cast<size_t>(file.gcount()));
    if (text.empty()) throw CLI::ValidationError(flag, "'" + given + "' is empty");
    if (text.size() > kBytesMax) {
      throw CLI::ValidationError(flag, "'" + given + "' is longer than " + std::to_string(kBytesMax) + " bytes");
    }
    source = std::move(text);
    if (path != nullptr) *path = given;
  };
  app.add_option_function<std::string>(flag, read, "Jinja chat template to use instead of the model file's own")
      ->type_name("FILE")
      ->default_str("the model file's");
}

}  // namespace jointkv::cli
