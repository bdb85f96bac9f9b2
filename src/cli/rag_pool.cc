#include "cli/rag_pool.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "cli/lines.h"
#include "text/template_guard.h"

namespace jointkv::cli {
namespace {

constexpr size_t kLineBytesMax = 1 << 20;
constexpr size_t kRowsMax = 1 << 16;

constexpr std::array<std::string_view, 24> kPlaces = {
    "Alder Bay",   "Brookfield", "Cedar Point", "Dunmore",   "Eastwick",  "Fairhaven", "Glenrock", "Harlow",
    "Iron Valley", "Juniper",    "Kingsbridge", "Lakewood",  "Marlow",    "Northgate", "Oakhurst", "Pinecrest",
    "Queensferry", "Redcliff",   "Stonebridge", "Thornbury", "Underwood", "Vale End",  "Westerly", "Yarrow"};
constexpr std::array<std::string_view, 24> kThings = {
    "museum",  "bridge", "harbour", "railway",   "library", "market",  "orchard", "lighthouse",
    "theatre", "school", "mill",    "hospital",  "canal",   "garden",  "tower",   "observatory",
    "stadium", "mine",   "castle",  "town hall", "airport", "factory", "park",    "monastery"};
constexpr std::array<std::string_view, 16> kAdjectives = {
    "old",    "large", "quiet",     "famous",   "stone", "wooden", "modern", "narrow",
    "public", "royal", "abandoned", "restored", "local", "busy",   "remote", "well known"};
constexpr std::array<std::string_view, 12> kPeople = {
    "an engineer", "a merchant", "the council",        "a group of farmers", "an architect",   "a retired teacher",
    "a sailor",    "the bishop", "a family of bakers", "the governor",       "a young doctor", "two brothers"};
constexpr std::array<std::string_view, 12> kActs = {"built",     "paid for", "designed", "repaired",
                                                    "described", "sold",     "visited",  "painted",
                                                    "extended",  "opened",   "rebuilt",  "measured"};
constexpr std::array<std::string_view, 10> kReasons = {
    "after a long winter",       "to attract visitors",    "because the river had changed its course",
    "during the great drought",  "with money from abroad", "against the advice of the mayor",
    "in less than three months", "to everyone's surprise", "when the old one burned down",
    "for the price of one horse"};

template <size_t kSize>
std::string Pick(const std::array<std::string_view, kSize>& words, std::mt19937_64& random) {
  return std::string(words[random() % kSize]);
}

std::string Sentence(const std::string& place, const std::string& thing, std::mt19937_64& random) {
  const uint64_t year = 1700 + random() % 300;
  const std::string adjective = Pick(kAdjectives, random);
  const std::string people = Pick(kPeople, random);
  const std::string act = Pick(kActs, random);
  const std::string other = Pick(kThings, random);
  switch (random() % 5) {
    case 0: return fmt::format(" In {}, {} {} the {} {}.", year, people, act, thing, Pick(kReasons, random));
    case 1: return fmt::format(" The {} {} beside it was {} by {} in {}.", adjective, other, act, people, year);
    case 2:
      return fmt::format(" It stands {} miles from {}, next to the {} {}.", 2 + random() % 60, Pick(kPlaces, random),
                         adjective, other);
    case 3: return fmt::format(" About {} people come to {} every year to see it.", 100 * (1 + random() % 90), place);
    default: return fmt::format(" Until {} it was {}, and {} kept the keys.", year, adjective, people);
  }
}

int Words(const std::string& text) { return static_cast<int>(std::ranges::count(text, ' ')) + 1; }

Expected<Document> ParseDocument(const std::string& line) {
  if (line.size() > kLineBytesMax)
    return Status(StatusCode::kOutOfRange, "more than " + std::to_string(kLineBytesMax) + " bytes");
  RETURN_IF_ERROR(text::CheckJsonDepth(line, "row"));
  const nlohmann::json row = nlohmann::json::parse(line, nullptr, false);
  if (!row.is_object()) return Status(StatusCode::kInvalidArgument, "not a JSON object");
  Document document;
  for (const auto& [key, target] :
       {std::pair{"title", &document.title}, {"text", &document.text}, {"question", &document.question}}) {
    const auto found = row.find(key);
    if (found == row.end() || !found->is_string())
      return Status(StatusCode::kInvalidArgument, std::string(key) + ": expected a string");
    *target = found->get<std::string>();
  }
  if (const auto answers = row.find("answers"); answers != row.end()) {
    const bool strings =
        answers->is_array() && std::ranges::all_of(*answers, [](const auto& a) { return a.is_string(); });
    if (!strings) return Status(StatusCode::kInvalidArgument, "answers: expected an array of strings");
    document.answers = answers->get<std::vector<std::string>>();
  }
  return document;
}

}  // namespace

std::vector<Document> MakeUpDocuments(int count, uint64_t seed) {
  constexpr int kWords = 80;  // about 130 tokens, as 100 words of an encyclopedia have: here every year is four
  std::mt19937_64 random(seed);
  std::vector<Document> documents;
  for (int i = 0; i < count; ++i) {
    const std::string place = Pick(kPlaces, random);
    const std::string thing = Pick(kThings, random);
    Document document;
    document.title = fmt::format("The {} of {}", thing, place);
    const std::string adjective = Pick(kAdjectives, random);
    document.text = fmt::format("{} is a {} place.", document.title, adjective);
    document.answers = {fmt::format("a {} place", adjective)};
    while (Words(document.text) < kWords) document.text += Sentence(place, thing, random);
    document.question = fmt::format("What is known about the {} of {}?", thing, place);
    documents.push_back(std::move(document));
  }
  return documents;
}

Expected<std::vector<Document>> ReadDocuments(const std::string& path, size_t least) {
  std::vector<Document> documents;
  Status bad;
  const Status read = ReadLines(path, kLineBytesMax, [&](int number, const std::string& line) {
    if (documents.size() == kRowsMax) {
      bad = Status(StatusCode::kOutOfRange, "'" + path + "' has more than " + std::to_string(kRowsMax) + " rows");
      return false;
    }
    Expected<Document> document = ParseDocument(line);
    if (!document.ok()) {
      const Status status = document.status();
      bad = Status(status.code(), path + ":" + std::to_string(number) + ": " + status.message());
      return false;
    }
    documents.push_back(std::move(document).value());
    return true;
  });
  RETURN_IF_ERROR(read);
  RETURN_IF_ERROR(bad);
  if (documents.size() < least) {
    return Status(StatusCode::kOutOfRange, "'" + path + "' has " + std::to_string(documents.size()) + " documents, " +
                                               std::to_string(least) + " are needed");
  }
  return documents;
}

std::vector<size_t> DrawOrder(size_t n, size_t k, std::mt19937_64& random) {
  CHECK(k <= n);
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = 0; i < k; ++i) std::swap(order[i], order[i + random() % (n - i)]);
  order.resize(k);
  return order;
}

RagPrompt MakeRagPrompt(const std::vector<Document>& documents, std::vector<size_t> drawn, size_t asked) {
  CHECK(asked < drawn.size());
  std::string content;
  for (const size_t index : drawn) {
    CHECK(index < documents.size());
    content += "Document: " + documents[index].title + "\n" + documents[index].text + "\n\n";
  }
  content += "Question: " + documents[drawn[asked]].question;
  return {{{"system", "Answer the question in a few words, from the documents."}, {"user", content}},
          std::move(drawn),
          asked};
}

RagPrompt DrawRagPrompt(const std::vector<Document>& documents, size_t per_prompt, std::mt19937_64& random) {
  CHECK(per_prompt >= 1);
  std::vector<size_t> drawn = DrawOrder(documents.size(), per_prompt, random);
  const size_t asked = random() % drawn.size();
  return MakeRagPrompt(documents, std::move(drawn), asked);
}

}  // namespace jointkv::cli
