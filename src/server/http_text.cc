#include "server/http_text.h"

#include <strings.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <ctime>

namespace jointkv::server {
namespace {

bool StartsWithScheme(std::string_view target, std::string_view scheme) {
  return target.size() >= scheme.size() && strncasecmp(target.data(), scheme.data(), scheme.size()) == 0;
}

}  // namespace

std::string PathOf(std::string_view target) {
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (!StartsWithScheme(target, scheme)) continue;
    target.remove_prefix(scheme.size());
    target.remove_prefix(std::min(target.find_first_of("/?#"), target.size()));
    if (!target.starts_with('/')) return "/";
    break;
  }
  return std::string(target.substr(0, target.find_first_of("?#")));
}

// Not strftime: its names are the locale's.
const std::string& HttpDate::At(int64_t unix_s) {
  if (unix_s == made_s_) return text_;
  static constexpr std::array<const char*, 7> kDays = {"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"};
  static constexpr std::array<const char*, 12> kMonths = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                                          "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  const time_t time = unix_s;
  tm utc{};
  gmtime_r(&time, &utc);
  char text[64];
  std::snprintf(text, sizeof(text), "%s, %02d %s %04d %02d:%02d:%02d GMT", kDays[static_cast<size_t>(utc.tm_wday)],
                utc.tm_mday, kMonths[static_cast<size_t>(utc.tm_mon)], utc.tm_year + 1900, utc.tm_hour, utc.tm_min,
                utc.tm_sec);
  text_ = text;
  made_s_ = unix_s;
  return text_;
}

const std::string& HttpDate::Now() { return At(static_cast<int64_t>(std::time(nullptr))); }

}  // namespace jointkv::server
