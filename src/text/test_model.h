// For the tests of this room: the default model's path.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace jointkv::text {

inline std::string DefaultModelPath() {
  if (const char* model = std::getenv("JOINTKV_MODEL"); model != nullptr && *model != 0) return model;
  const char* cache = std::getenv("JOINTKV_CACHE");
  const char* home = std::getenv("HOME");
  const std::string root = cache != nullptr && *cache != 0 ? cache : std::string(home ? home : ".") + "/.cache/jointkv";
  return root + "/models/SmolLM2-135M-Instruct.Q4_1.gguf";
}

}  // namespace jointkv::text

#define SKIP_WITHOUT_MODEL()                                         \
  if (!std::filesystem::exists(::jointkv::text::DefaultModelPath())) \
  GTEST_SKIP() << "no model file " << ::jointkv::text::DefaultModelPath()
