#include <hwy/highway.h>
#include <openssl/crypto.h>
#include <spdlog/fmt/fmt.h>
#include <spdlog/version.h>
#include <xxhash.h>

#include <boost/version.hpp>
#include <nlohmann/json.hpp>

#include "base/cpu.h"
#include "cli/commands.h"
#include "dense/targets.h"

namespace jointkv::cli {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

}  // namespace

std::string VersionText() {
  std::string targets;
  for (const std::string& name : dense::SupportedTargetNames()) targets += (targets.empty() ? "" : " ") + name;
  std::string text = fmt::format("jointkv {}\n", JOINTKV_VERSION);
  text += fmt::format("build       {}, {}\n", JOINTKV_BUILD_TYPE, kCompiler);
  text +=
      fmt::format("CPU         AVX-512 BF16: {}, VNNI: {}, AVX2: {}; targets, best first: {}\n",
                  HasAvx512Bf16() ? "yes" : "no", HasAvx512Vnni() ? "yes" : "no", HasAvx2() ? "yes" : "no", targets);
  text += fmt::format("llama.cpp   {}\n", JOINTKV_LLAMA_VERSION);
  text += fmt::format("Highway     {}.{}.{}\n", HWY_MAJOR, HWY_MINOR, HWY_PATCH);
  text += fmt::format("xxHash      {}.{}.{}\n", XXH_VERSION_MAJOR, XXH_VERSION_MINOR, XXH_VERSION_RELEASE);
  text += fmt::format("spdlog      {}.{}.{}\n", SPDLOG_VER_MAJOR, SPDLOG_VER_MINOR, SPDLOG_VER_PATCH);
  text += fmt::format("fmt         {}.{}.{}\n", FMT_VERSION / 10000, FMT_VERSION / 100 % 100, FMT_VERSION % 100);
  text += fmt::format("CLI11       {}\n", CLI11_VERSION);
  text +=
      fmt::format("Boost       {}.{}.{}\n", BOOST_VERSION / 100000, BOOST_VERSION / 100 % 1000, BOOST_VERSION % 100);
  text += fmt::format("OpenSSL     {}\n", OpenSSL_version(OPENSSL_VERSION_STRING));
  text += fmt::format("nlohmann    {}.{}.{}", NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR,
                      NLOHMANN_JSON_VERSION_PATCH);
  return text;
}

}  // namespace jointkv::cli
