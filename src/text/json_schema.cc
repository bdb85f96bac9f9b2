#include "text/json_schema.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <map>
#include <set>

#include "json-schema-to-grammar.h"
#include "text/detokenizer.h"
#include "text/template_guard.h"

namespace jointkv::text {
namespace {

using Json = common_json;

constexpr size_t kQuotedBytesMax = 64;
constexpr double kExactInteger = 9007199254740992.0;  // 2^53
constexpr int64_t kOptionalWorkMax = int64_t{1} << 22;
constexpr int kReferenceChainMax = 64;

std::string Quote(std::string_view text) {
  return "'" + SanitizeUtf8(text.substr(0, kQuotedBytesMax)) + (text.size() > kQuotedBytesMax ? "...'" : "'");
}

// What the converter replaces by any string; empty: nothing of the kind.
std::string WhyInexpressible(const std::string& pattern) {
  if (pattern.size() < 2 || pattern.front() != '^' || pattern.back() != '$') return "must begin with ^ and end with $";
  for (size_t i = 1; i + 1 < pattern.size(); ++i) {
    const char c = pattern[i];
    const char next = pattern[i + 1];
    if (c == '\\') {
      const bool letter = std::isalnum(static_cast<unsigned char>(next)) != 0;
      if (letter && std::string_view("xuUtrn").find(next) == std::string_view::npos) {
        return std::string("the escape \\") + next + " is not supported";
      }
      ++i;
    } else if (c == '^' && pattern[i - 1] != '[') {
      return "an anchor inside";
    } else if (c == '(' && next == '?' && pattern.compare(i, 3, "(?:") != 0) {
      return "groups with options are not supported";
    }
  }
  return {};
}

void DropInexpressible(Json& node) {
  if (node.is_object() && node.contains("pattern") && node.at("pattern").is_string() &&
      !WhyInexpressible(node.at("pattern").get<std::string>()).empty()) {
    node.erase("pattern");
  }
  if (!node.is_object() && !node.is_array()) return;
  for (Json& child : node) DropInexpressible(child);
}

// Walks a parsed schema once, as a tree of JSON, and its references as a graph.
class Checker {
 public:
  Checker(const Json& root, std::string_view what, const SchemaLimits& limits)
      : root_(root), what_(what), limits_(limits) {}

  Status Check() {
    if (!root_.is_object()) return Invalid("is not an object");
    int levels = 0;
    const int64_t nodes = Visit(root_, 1, levels);
    levels_ += levels;
    for (const auto& [ref, target] : targets_) {
      if (!ok()) break;
      int depth = 0;
      if (target != nullptr) Measure(*target, 1, depth);
      levels_ += depth;
      Alternatives(ref);
    }
    WaysOf(root_);
    Limit("schemas", nodes, limits_.nodes_max);
    Limit("levels together with what it refers to", levels_, limits_.levels_max);
    Limit("steps of combining optional properties", optional_work_, kOptionalWorkMax);
    return error_;
  }

 private:
  bool ok() const { return error_.ok(); }
  Status Invalid(const std::string& why) const {
    return {StatusCode::kInvalidArgument, std::string(what_) + ": " + why};
  }
  void Fail(Status status) {
    if (ok()) error_ = std::move(status);
  }
  void Limit(const std::string& thing, int64_t value, int64_t limit) {
    if (value <= limit) return;
    Fail({StatusCode::kOutOfRange,
          std::string(what_) + ": " + thing + ": " + std::to_string(value) + ", limit " + std::to_string(limit)});
  }

  // Schemas that the library makes of this one, itself included; saturates.
  int64_t Visit(const Json& node, int depth, int& deepest) {
    deepest = std::max(deepest, depth);
    if (!ok()) return 0;
    int64_t inside = 0;
    if (node.is_object()) {
      CheckObject(node);
      for (const auto& [key, value] : node.items()) {
        Limit("bytes of a key", static_cast<int64_t>(key.size()), static_cast<int64_t>(limits_.key_bytes_max));
        inside += Visit(value, depth + 1, deepest);
      }
    } else if (node.is_array()) {
      for (const Json& value : node) inside += Visit(value, depth + 1, deepest);
    } else {
      return 0;
    }
    int64_t copies = 1;
    if (node.is_object() && node.contains("type") && node.at("type").is_array()) {
      copies = std::max<int64_t>(1, static_cast<int64_t>(node.at("type").size()));
    }
    return std::min(copies * (1 + inside), limits_.nodes_max + 1);
  }

  void Measure(const Json& node, int depth, int& deepest) const {
    deepest = std::max(deepest, depth);
    if (!node.is_object() && !node.is_array()) return;
    for (const Json& value : node) Measure(value, depth + 1, deepest);
  }

  void CheckObject(const Json& node) {
    if (node.contains("$ref") && node.at("$ref").is_string()) AddReference(node.at("$ref").get<std::string>());
    if (node.contains("pattern") && node.at("pattern").is_string()) CheckPattern(node.at("pattern").get<std::string>());
    for (const char* bound : {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}) {
      if (!node.contains(bound) || !node.at(bound).is_number()) continue;
      if (std::abs(node.at(bound).get<double>()) <= kExactInteger) continue;
      Fail({StatusCode::kOutOfRange, std::string(what_) + ": " + bound + " is beyond 2^53"});
    }
    for (const char* count : {"minLength", "maxLength", "minItems", "maxItems"}) {
      if (!node.contains(count) || !node.at(count).is_number()) continue;
      const double value = node.at(count).get<double>();
      if (value >= 0 && value <= 1e9 && value == std::floor(value)) continue;
      Fail({StatusCode::kOutOfRange, std::string(what_) + ": " + count + " must be a whole number from 0 to 10^9"});
    }
    if (node.contains("properties") && node.at("properties").is_object()) CheckProperties(node);
  }

  void CheckProperties(const Json& node) {
    int64_t optional = static_cast<int64_t>(node.at("properties").size());
    if (node.contains("required") && node.at("required").is_array()) {
      std::set<std::string> required;
      for (const Json& name : node.at("required")) {
        if (name.is_string()) required.insert(name.get<std::string>());
      }
      for (const std::string& name : required) optional -= node.at("properties").contains(name) ? 1 : 0;
    }
    Limit("optional properties of an object", optional, limits_.optional_properties_max);
    optional_work_ += optional * optional * optional;
  }

  void CheckPattern(const std::string& pattern) {
    Limit("patterns", ++patterns_, limits_.patterns_max);
    Limit("bytes of a pattern", static_cast<int64_t>(pattern.size()), static_cast<int64_t>(limits_.pattern_bytes_max));
    const std::string why = WhyInexpressible(pattern);
    if (!why.empty()) {
      Fail({StatusCode::kUnsupported, std::string(what_) + ": pattern " + Quote(pattern) + ": " + why});
    }
  }

  void AddReference(const std::string& ref) {
    Limit("references", ++references_, limits_.references_max);
    if (targets_.contains(ref)) return;
    const Json* target = Resolve(ref);
    targets_.emplace(ref, target);
    if (target == nullptr) Fail(Invalid("$ref " + Quote(ref) + " does not exist"));
  }

  const Json* Resolve(const std::string& ref) const {
    if (!ref.starts_with("#/")) return nullptr;
    const Json* at = &root_;
    for (size_t begin = 2; begin <= ref.size();) {
      const size_t end = std::min(ref.find('/', begin), ref.size());
      const std::string key = ref.substr(begin, end - begin);
      if (at->is_object() && at->contains(key)) {
        at = &at->at(key);
      } else if (at->is_array() && !key.empty() && key.size() < 6 &&
                 std::ranges::all_of(key, [](char c) { return c >= '0' && c <= '9'; }) &&
                 static_cast<size_t>(std::stoi(key)) < at->size()) {
        at = &at->at(static_cast<size_t>(std::stoi(key)));
      } else {
        return nullptr;
      }
      begin = end + 1;
    }
    return at;
  }

  // Ways through references and alternatives that read nothing in between: the library follows each of them.
  int64_t Alternatives(const std::string& ref) {
    const auto known = ways_.find(ref);
    if (known != ways_.end()) return known->second;
    if (!in_progress_.insert(ref).second || in_progress_.size() > kReferenceChainMax) {
      Fail(Invalid("$ref " + Quote(ref) + " refers to itself, or through too many others"));
      return 0;
    }
    const Json* target = targets_.contains(ref) ? targets_.at(ref) : nullptr;
    const int64_t ways = target == nullptr ? 1 : WaysOf(*target);
    in_progress_.erase(ref);
    return ways_[ref] = std::min(ways, limits_.nodes_max + 1);
  }

  int64_t WaysOf(const Json& node) {
    if (!ok() || !node.is_object()) return 1;
    if (node.contains("$ref") && node.at("$ref").is_string()) {
      return 1 + Alternatives(node.at("$ref").get<std::string>());
    }
    int64_t ways = 1;
    for (const char* key : {"anyOf", "oneOf", "allOf"}) {
      if (!node.contains(key) || !node.at(key).is_array()) continue;
      for (const Json& child : node.at(key)) ways += WaysOf(child);
    }
    Limit("ways through its references", ways, limits_.nodes_max);
    return ways;
  }

  const Json& root_;
  std::string_view what_;
  const SchemaLimits& limits_;
  Status error_;
  int64_t levels_ = 0;
  int64_t references_ = 0;
  int64_t patterns_ = 0;
  int64_t optional_work_ = 0;
  std::map<std::string, const Json*> targets_;
  std::map<std::string, int64_t> ways_;
  std::set<std::string> in_progress_;
};

Expected<Json> ParseSchema(std::string_view schema, std::string_view what, bool drops_inexpressible) {
  const SchemaLimits limits;
  if (schema.size() > limits.bytes_max) {
    return Status(StatusCode::kOutOfRange, std::string(what) + ": " + std::to_string(schema.size()) +
                                               " bytes of schema, limit " + std::to_string(limits.bytes_max));
  }
  RETURN_IF_ERROR(CheckJsonDepth(schema, what, limits.depth_max));
  Json parsed = Json::parse_no_throw(std::string(schema));
  if (parsed.is_discarded()) return Status(StatusCode::kInvalidArgument, std::string(what) + ": not valid JSON");
  if (drops_inexpressible) DropInexpressible(parsed);
  RETURN_IF_ERROR(Checker(parsed, what, limits).Check());
  return parsed;
}

}  // namespace

Expected<std::string> ExpressibleSchema(std::string_view schema, std::string_view what) try {
  ASSIGN_OR_RETURN(const Json parsed, ParseSchema(schema, what, true));
  return parsed.dump();
} catch (const std::exception& error) {
  return Status(StatusCode::kInvalidArgument, std::string(what) + ": " + SanitizeUtf8(error.what()));
}

Expected<std::string> JsonSchemaToGbnf(std::string_view schema, std::string_view what) try {
  ASSIGN_OR_RETURN(const Json parsed, ParseSchema(schema, what, false));
  return json_schema_to_grammar(parsed, true);
} catch (const std::exception& error) {
  return Status(StatusCode::kInvalidArgument, std::string(what) + ": " + SanitizeUtf8(error.what()));
}

}  // namespace jointkv::text
