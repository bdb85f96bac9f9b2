// Ends a generated text before the first stop string.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace jointkv::engine {

// Takes the text of one sequence piece by piece and hands on what can no longer become part of a stop string.
// Threads: one at a time. Owns: the stop strings and the text held back, less than the longest stop string; allocates
// only for a piece longer than any before. Fails how: Create rejects an empty stop string.
//
// The match that ends first wins, as if the text came byte by byte, so how it is cut into pieces makes no difference;
// of several that end together the longest wins. Held text starts where a stop string starts, so if those and the
// pieces are whole UTF-8 characters, so is what is handed on.
class StopStringMatcher {
 public:
  static Expected<StopStringMatcher> Create(std::vector<std::string> stop_strings);

  // Text that may be emitted now; valid until the next call. After a stop, always empty.
  std::string_view Feed(std::string_view piece);

  // The generation ended for another reason: the text still held back.
  std::string_view Finish();

  bool stopped() const { return matched_ >= 0; }
  int matched() const { return matched_; }  // index of the stop string that ended the text, -1 = none so far
  size_t held_bytes() const { return text_.size() - emitted_; }

 private:
  explicit StopStringMatcher(std::vector<std::string> stop_strings);

  size_t HeldFrom() const;

  std::vector<std::string> stop_strings_;
  size_t longest_ = 0;
  std::string text_;    // what the last call emitted, then what is held back
  size_t emitted_ = 0;  // bytes of text_
  int matched_ = -1;
};

}  // namespace jointkv::engine
