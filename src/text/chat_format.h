// Inside this room only, for .cc files: what Render passes to ChatOutputParser.
//
// ChatFormat. Threads: const. Owns: the library's parser. Fails how: plain data.
#pragma once

#include "chat.h"
#include "text/chat_template.h"

namespace jointkv::text {

struct ChatFormat {
  common_chat_parser_params params;
};

}  // namespace jointkv::text
