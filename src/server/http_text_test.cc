#include "server/http_text.h"

#include <gtest/gtest.h>

namespace jointkv::server {
namespace {

TEST(HttpText, PathOfATarget) {
  for (const auto& [target, path] : {std::pair("/health", "/health"),
                                     {"/v1/models?x=1#y", "/v1/models"},
                                     {"*", "*"},
                                     {"http://host/health", "/health"},
                                     {"HTTP://host:80/a/b?c=http://d/e", "/a/b"},
                                     {"https://[::1]:8443/x#y", "/x"},
                                     {"http://host", "/"},
                                     {"http://host?x=/y", "/"},
                                     {"http://", "/"},
                                     {"ftp://host/x", "ftp://host/x"},
                                     {"", ""},
                                     {"/http://host/x", "/http://host/x"}}) {
    EXPECT_EQ(PathOf(target), path) << target;
  }
}

TEST(HttpText, Dates) {
  HttpDate date;
  EXPECT_EQ(date.At(784111777), "Sun, 06 Nov 1994 08:49:37 GMT");  // RFC 9110's example
  EXPECT_EQ(date.At(784111777), "Sun, 06 Nov 1994 08:49:37 GMT");
  EXPECT_EQ(date.At(0), "Thu, 01 Jan 1970 00:00:00 GMT");
  EXPECT_EQ(date.At(1709210096), "Thu, 29 Feb 2024 12:34:56 GMT");
  EXPECT_EQ(date.Now().size(), date.At(0).size());
}

}  // namespace
}  // namespace jointkv::server
