// JSON schemas of clients: checked, and as grammars by llama.cpp's converter.
//
// The converter has no limits of its own: it recurses as deep as a schema and its references nest, and some short
// schemas take time exponential in their length. A pattern that it cannot express, which it would ignore, is refused.
//
// Threads: free functions, any number of threads. Owns: nothing. Fails how: a Status that names the schema's part and
// the limit; `what` says whose schema it is.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace jointkv::text {

struct SchemaLimits {
  size_t bytes_max = size_t{64} << 10;
  size_t depth_max = 40;      // of the JSON text
  int levels_max = 1024;      // of it and all that it refers to
  int64_t nodes_max = 20000;  // schemas after "type": [..] has become one alternative per type
  int references_max = 2000;  // $ref
  size_t key_bytes_max = 512;
  int optional_properties_max = 128;  // of one object: the converter takes time cubic in them
  int patterns_max = 64;
  size_t pattern_bytes_max = 1024;
};

// The schema, checked, for the library to use elsewhere (a tool's parameters). Here patterns that the converter cannot
// express are left out: the model is asked for them by the tool's description only.
Expected<std::string> ExpressibleSchema(std::string_view schema, std::string_view what);

// GBNF text whose rule "root" is a JSON value as the schema says. Not expressed are what grammars cannot count or
// compare (minimum of a fraction, uniqueItems, not, if) and properties out of the schema's order.
Expected<std::string> JsonSchemaToGbnf(std::string_view schema, std::string_view what);

}  // namespace jointkv::text
