#include "server/page.h"

#include <map>
#include <regex>
#include <set>
#include <string>

#include <gtest/gtest.h>

namespace jointkv::server {
namespace {

std::map<std::string, std::string> Files() {
  std::map<std::string, std::string> files;
  for (const PageFile& file : PageFiles()) EXPECT_TRUE(files.emplace(file.path, file.bytes).second) << file.path;
  return files;
}

// All that matches of the first group.
std::set<std::string> FindAll(const std::string& text, const std::string& pattern) {
  const std::regex regex(pattern);
  std::set<std::string> found;
  for (std::sregex_iterator at(text.begin(), text.end(), regex), end; at != end; ++at) found.insert((*at)[1]);
  return found;
}

TEST(Page, IsWhole) {
  const auto files = Files();
  ASSERT_TRUE(files.contains("/"));
  EXPECT_TRUE(files.at("/").starts_with("<!doctype html>"));
  EXPECT_TRUE(files.at("/").ends_with("</html>\n"));
  for (const PageFile& file : PageFiles()) {
    EXPECT_FALSE(file.bytes.empty()) << file.path;
    EXPECT_EQ(file.path.ends_with(".js"), file.content_type == "text/javascript; charset=utf-8") << file.path;
    EXPECT_EQ(file.path.ends_with(".css"), file.content_type == "text/css; charset=utf-8") << file.path;
  }
}

TEST(Page, NamesOnlyFilesThatItHas) {
  const auto files = Files();
  int names = 0;
  for (const auto& [path, text] : files) {
    for (const std::string& name : FindAll(text, "(?:src=|href=|from |url\\()[\"']([^\"']+)[\"']")) {
      EXPECT_TRUE(files.contains(name)) << path << " names " << name;
      ++names;
    }
  }
  EXPECT_GT(names, 10);
}

// What the security policy would refuse, and what would let a model's text become markup.
TEST(Page, HasNeitherInlineCodeNorOutsideResourcesNorMarkupFromText) {
  for (const auto& [path, text] : Files()) {
    for (const char* pattern :
         {"(innerHTML|outerHTML|insertAdjacentHTML|document\\.write|eval\\(|new Function)",
          "(https?://(?!www\\.w3\\.org/2000/svg)[^ \"']*)", "(<script>)", "(<style)", "( style=)", "( on[a-z]+=\")"}) {
      EXPECT_EQ(FindAll(text, pattern), std::set<std::string>()) << path;
    }
  }
}

TEST(Page, ItsScriptsFindTheirElements) {
  const auto files = Files();
  const auto ids = FindAll(files.at("/"), " id=\"([^\"]+)\"");
  for (const auto& [path, text] : files) {
    for (const std::string& id : FindAll(text, "byId\\('([^']+)'\\)"))
      EXPECT_TRUE(ids.contains(id)) << path << " " << id;
  }
}

}  // namespace
}  // namespace jointkv::server
