#include "base/bytes.h"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>

namespace jointkv {
namespace {

TEST(BytesTest, ParsesWhatPeopleWrite) {
  const struct {
    const char* text;
    size_t bytes;
  } kCases[] = {
      {"0", 0},
      {"1", 1},
      {"512M", size_t{512} << 20},
      {"512m", size_t{512} << 20},
      {"2G", size_t{2} << 30},
      {"2GB", size_t{2} << 30},
      {"1.5 GiB", size_t{3} << 29},
      {"0.5k", 512},
      {"3KiB", 3072},
      {"7B", 7},
      {"1T", size_t{1} << 40},
      {"1e3", 1000},
      {"4194303T", size_t{4194303} << 40},
  };
  for (const auto& c : kCases) {
    const Expected<size_t> bytes = ParseBytes(c.text);
    ASSERT_TRUE(bytes.ok()) << c.text << ": " << bytes.status().ToString();
    EXPECT_EQ(*bytes, c.bytes) << c.text;
  }
}

TEST(BytesTest, RefusesWhatIsNoSize) {
  for (const char* text :
       {"", " ", "G", "-1", "-1M", "1X", "1MM", "1 2", "nan", "0x10", "1GiBs", "M1", "--", "1..2G"}) {
    const Expected<size_t> bytes = ParseBytes(text);
    ASSERT_FALSE(bytes.ok()) << "'" << text << "' = " << *bytes;
    EXPECT_EQ(bytes.status().code(), StatusCode::kInvalidArgument) << text;
    EXPECT_NE(bytes.status().message().find("'" + std::string(text) + "'"), std::string::npos);
  }
}

TEST(BytesTest, RefusesWhatIsTooLarge) {
  for (const char* text : {"4194304T", "1e30", "inf", "99999999999999999999G"}) {
    const Expected<size_t> bytes = ParseBytes(text);
    ASSERT_FALSE(bytes.ok()) << text;
    EXPECT_EQ(bytes.status().code(), StatusCode::kOutOfRange) << text;
  }
}

TEST(BytesTest, Formats) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.0 KiB");
  EXPECT_EQ(FormatBytes(size_t{134} << 20), "134.0 MiB");
  EXPECT_EQ(FormatBytes(size_t{5} << 50), "5120.0 TiB");
}

TEST(BytesTest, ControlGroupsLimitEachOther) {
  namespace fs = std::filesystem;
  const fs::path root = fs::path(testing::TempDir()) / "control_groups";
  fs::remove_all(root);
  fs::create_directories(root / "a" / "b");
  const auto write = [&](const char* name, const char* text) { std::ofstream(root / name) << text; };
  const auto left = [&](const char* membership) {
    write("membership", membership);
    return ControlGroupBytesLeft(root.string(), (root / "membership").string());
  };
  EXPECT_EQ(left("0::/a/b\n"), SIZE_MAX);  // no files
  write("a/b/memory.max", "max\n");
  write("a/b/memory.current", "10\n");
  EXPECT_EQ(left("0::/a/b\n"), SIZE_MAX);
  write("a/memory.max", "1000\n");
  write("a/memory.current", "400\n");
  EXPECT_EQ(left("1:name=systemd:/x\n0::/a/b\n"), 600U);
  write("a/b/memory.max", "25\n");
  EXPECT_EQ(left("0::/a/b\n"), 15U);
  write("a/b/memory.current", "30\n");
  EXPECT_EQ(left("0::/a/b\n"), 0U);
  EXPECT_EQ(left("0::/a\n"), 600U);
  EXPECT_EQ(left("0::/\n"), SIZE_MAX);
  write("memory.max", "7\n");
  write("memory.current", "1\n");
  EXPECT_EQ(left("0::/\n"), 6U);
  EXPECT_EQ(left(""), SIZE_MAX);  // version 1
  fs::remove_all(root);
}

TEST(BytesTest, KnowsTheMachine) {
  EXPECT_GT(AvailableMemoryBytes(), size_t{1} << 20);
  EXPECT_GT(ResidentBytes(), size_t{100} << 10);
}

}  // namespace
}  // namespace jointkv
