// The page: static files that are part of the program. Their sources lie in src/server/page/.
//
// Threads: any. Owns: constants. Fails how: never.
#pragma once

#include <span>
#include <string_view>

namespace jointkv::server {

struct PageFile {
  std::string_view path;  // of the URL
  std::string_view content_type;
  std::string_view bytes;
};

std::span<const PageFile> PageFiles();

// For the header Content-Security-Policy of each: own files only, and none of them in a frame.
inline constexpr std::string_view kPageSecurityPolicy =
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'";

}  // namespace jointkv::server
