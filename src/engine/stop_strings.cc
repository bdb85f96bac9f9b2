#include "engine/stop_strings.h"

#include <algorithm>
#include <utility>

namespace jointkv::engine {

Expected<StopStringMatcher> StopStringMatcher::Create(std::vector<std::string> stop_strings) {
  for (size_t i = 0; i < stop_strings.size(); ++i) {
    if (stop_strings[i].empty()) {
      return Status(StatusCode::kInvalidArgument,
                    "stop strings: stop[" + std::to_string(i) + "] is empty, must have at least 1 byte");
    }
  }
  return StopStringMatcher(std::move(stop_strings));
}

StopStringMatcher::StopStringMatcher(std::vector<std::string> stop_strings) : stop_strings_(std::move(stop_strings)) {
  for (const std::string& stop : stop_strings_) longest_ = std::max(longest_, stop.size());
  text_.reserve(longest_ + 256);
}

std::string_view StopStringMatcher::Feed(std::string_view piece) {
  if (stopped()) return {};
  text_.erase(0, emitted_);
  text_.append(piece);

  size_t end = std::string::npos;
  for (size_t i = 0; i < stop_strings_.size(); ++i) {
    const std::string& stop = stop_strings_[i];
    const size_t start = text_.find(stop);
    if (start == std::string::npos) continue;
    const size_t stop_end = start + stop.size();
    if (matched_ >= 0 && (stop_end > end || (stop_end == end && stop.size() <= stop_strings_[matched_].size())))
      continue;
    end = stop_end;
    matched_ = static_cast<int>(i);
  }
  if (matched_ >= 0) {
    text_.resize(end - stop_strings_[matched_].size());
    emitted_ = text_.size();
  } else {
    emitted_ = HeldFrom();
  }
  return std::string_view(text_).substr(0, emitted_);
}

std::string_view StopStringMatcher::Finish() {
  text_.erase(0, emitted_);
  emitted_ = text_.size();
  return text_;
}

// Where the longest suffix of the text that begins a stop string starts; the text's end if there is none.
size_t StopStringMatcher::HeldFrom() const {
  const std::string_view text = text_;
  for (size_t start = text.size() - std::min(text.size(), longest_); start < text.size(); ++start) {
    const std::string_view suffix = text.substr(start);
    for (const std::string& stop : stop_strings_) {
      if (stop.size() > suffix.size() && stop.starts_with(suffix)) return start;
    }
  }
  return text.size();
}

}  // namespace jointkv::engine
