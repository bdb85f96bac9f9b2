#include "cli/output_files.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace jointkv::cli {
namespace {

class OutputFilesTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(testing::TempDir()) / ("output_files_" + std::to_string(getpid()));
    std::filesystem::create_directory(folder_);
    std::ofstream(At("input")) << "text";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string At(const std::string& name) const { return (folder_ / name).string(); }

  // What CheckOutputs says of one input and these outputs.
  Status Check(const std::string& a, const std::string& b = "") const {
    return CheckOutputs({{"--prompts", At("input")}, {"--docs", ""}}, {{"--json", a}, {"--plot", b}});
  }

  std::filesystem::path folder_;
};

TEST_F(OutputFilesTest, FilesThatCanBeWrittenMayBe) {
  std::ofstream(At("old")) << "text";
  EXPECT_TRUE(Check("", "").ok());
  EXPECT_TRUE(Check("-", At("new")).ok());
  EXPECT_TRUE(Check(At("old"), At("new")).ok());
  EXPECT_TRUE(Check("/dev/null", "/dev/null").ok());
  EXPECT_FALSE(std::filesystem::exists(At("new")));
}

TEST_F(OutputFilesTest, AnInputIsNotOverwritten) {
  std::filesystem::create_symlink("input", At("link"));
  std::filesystem::create_hard_link(At("input"), At("hard"));
  for (const std::string& path :
       {At("input"), At("link"), At("hard"), At("../") + folder_.filename().string() + "/input"}) {
    const Status status = Check("", path);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << path;
    EXPECT_EQ(status.message(), "--plot '" + path + "': is the file of --prompts, which would be overwritten");
  }
}

TEST_F(OutputFilesTest, TwoOutputsAreTwoFiles) {
  std::ofstream(At("old")) << "text";
  std::filesystem::create_symlink("old", At("link"));
  std::filesystem::create_directory_symlink(".", At("here"));
  EXPECT_EQ(Check(At("old"), At("link")).message(), "--plot '" + At("link") + "': is where --json writes to");
  EXPECT_EQ(Check(At("new"), At("here/./new")).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Check("-", "-").code(), StatusCode::kInvalidArgument);
}

TEST_F(OutputFilesTest, WhatCannotBeWrittenIsSeenAtOnce) {
  EXPECT_EQ(Check(folder_.string()).message(), "--json '" + folder_.string() + "': is a directory");
  EXPECT_EQ(Check(At("none/new")).message(),
            "--json '" + At("none/new") + "': there is no directory '" + At("none") + "'");
  EXPECT_EQ(Check(At("input/new")).code(), StatusCode::kIo);
  if (geteuid() == 0) return;  // whom no permission stops
  std::filesystem::permissions(folder_, std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  EXPECT_EQ(Check(At("new")).code(), StatusCode::kIo);
  std::filesystem::permissions(folder_, std::filesystem::perms::owner_all);
}

}  // namespace
}  // namespace jointkv::cli
