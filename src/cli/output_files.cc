#include "cli/output_files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>
#include <system_error>

namespace jointkv::cli {
namespace {

// Device and inode of a regular file, and for one that is still to be made the path without links.
struct Identity {
  dev_t device = 0;
  ino_t inode = 0;
  std::string path;

  bool operator==(const Identity&) const = default;
};

std::optional<struct stat> StatOf(const std::string& path, int standard) {
  struct stat found = {};
  const int failed = path == "-" ? fstat(standard, &found) : stat(path.c_str(), &found);
  if (failed != 0) return std::nullopt;
  return found;
}

// None for terminals, pipes, devices and folders.
std::optional<Identity> IdentityOf(const std::string& path, int standard) {
  if (const auto found = StatOf(path, standard)) {
    if (!S_ISREG(found->st_mode)) return std::nullopt;
    return Identity{.device = found->st_dev, .inode = found->st_ino, .path = {}};
  }
  std::error_code error;
  const auto absolute = std::filesystem::weakly_canonical(std::filesystem::absolute(path, error), error);
  if (error) return std::nullopt;
  return Identity{.path = absolute.string()};
}

std::string Name(const NamedFile& file) { return std::string(file.flag) + " '" + file.path + "'"; }

Status CheckWritable(const NamedFile& file) {
  if (file.path == "-") return Status::Ok();
  if (const auto found = StatOf(file.path, STDOUT_FILENO)) {
    if (S_ISDIR(found->st_mode)) return {StatusCode::kInvalidArgument, Name(file) + ": is a directory"};
    if (access(file.path.c_str(), W_OK) == 0) return Status::Ok();
    return {StatusCode::kIo, Name(file) + ": " + std::strerror(errno)};
  }
  if (errno != ENOENT) return {StatusCode::kIo, Name(file) + ": " + std::strerror(errno)};
  std::filesystem::path folder = std::filesystem::path(file.path).parent_path();
  if (folder.empty()) folder = ".";
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    return {StatusCode::kNotFound, Name(file) + ": there is no directory '" + folder.string() + "'"};
  }
  if (access(folder.c_str(), W_OK | X_OK) == 0) return Status::Ok();
  return {StatusCode::kIo, Name(file) + ": " + std::strerror(errno)};
}

}  // namespace

Status CheckOutputs(const std::vector<NamedFile>& inputs, const std::vector<NamedFile>& outputs) {
  for (size_t i = 0; i < outputs.size(); ++i) {
    const NamedFile& output = outputs[i];
    if (output.path.empty()) continue;
    if (Status status = CheckWritable(output); !status.ok()) return status;
    const std::optional<Identity> identity = IdentityOf(output.path, STDOUT_FILENO);
    for (const NamedFile& input : inputs) {
      const bool same = identity && !input.path.empty() && identity == IdentityOf(input.path, STDIN_FILENO);
      if (same) {
        return {StatusCode::kInvalidArgument,
                Name(output) + ": is the file of " + input.flag + ", which would be overwritten"};
      }
    }
    for (size_t j = 0; j < i; ++j) {
      if (outputs[j].path.empty()) continue;
      const bool same = (output.path == "-" && outputs[j].path == "-") ||
                        (identity && identity == IdentityOf(outputs[j].path, STDOUT_FILENO));
      if (same) return {StatusCode::kInvalidArgument, Name(output) + ": is where " + outputs[j].flag + " writes to"};
    }
  }
  return Status::Ok();
}

}  // namespace jointkv::cli
