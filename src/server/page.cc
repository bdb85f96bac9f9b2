#include "server/page.h"

#include <string>
#include <utility>
#include <vector>

#include "base/check.h"

namespace jointkv {

// Written by cmake/embed.cmake from src/server/page/: names and bytes.
extern const std::vector<std::pair<std::string_view, std::string_view>> kEmbeddedPage;

namespace server {
namespace {

std::string_view ContentType(std::string_view name) {
  if (name.ends_with(".html")) return "text/html; charset=utf-8";
  if (name.ends_with(".css")) return "text/css; charset=utf-8";
  if (name.ends_with(".js")) return "text/javascript; charset=utf-8";
  CHECK(name.ends_with(".svg"));
  return "image/svg+xml";
}

struct Page {
  std::vector<std::string> paths;
  std::vector<PageFile> files;

  Page() {
    paths.reserve(kEmbeddedPage.size());
    for (const auto& [name, bytes] : kEmbeddedPage) {
      const std::string& path = paths.emplace_back(name == "index.html" ? "/" : "/page/" + std::string(name));
      files.push_back({path, ContentType(name), bytes});
    }
  }
};

}  // namespace

std::span<const PageFile> PageFiles() {
  static const Page kPage;
  return kPage.files;
}

}  // namespace server
}  // namespace jointkv
