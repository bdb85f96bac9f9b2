#include "server/views.h"

#include <utility>

#include "base/clock.h"
#include "server/block_map.h"
#include "server/status_json.h"

namespace jointkv::server {

namespace {

constexpr double kFreshS = 0.5;

}  // namespace

void Views::Status(Take take) { Give(status_, StatusJson, std::move(take)); }

void Views::Blocks(std::optional<DomainId> domain, Take take) {
  Give(
      blocks_[domain], [domain](const engine::Engine& engine) { return BlockMapJson(engine, domain); },
      std::move(take));
}

void Views::Give(View& view, std::function<std::string(const engine::Engine&)> make, Take take) {
  if (view.made_s > 0 && MonotonicSeconds() - view.made_s < kFreshS) {
    take(view.text);
    return;
  }
  view.waiting.push_back(std::move(take));
  if (view.waiting.size() > 1) return;
  engine_.Ask(std::move(make), [this, &view](std::string text) {
    on_io_thread_([&view, text = std::move(text)] {
      view.text = text;
      view.made_s = MonotonicSeconds();
      for (const Take& waiting : std::exchange(view.waiting, {})) waiting(view.text);
    });
  });
}

}  // namespace jointkv::server
