// Views: what the page asks for about once a second, made by the engine's thread between two steps.
//
// However many ask, each view is made at most twice a second; who comes meanwhile gets the same text.
//
// Threads: the I/O thread. Owns: the latest texts. Fails how: what the engine no longer answers is never taken.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "server/engine_thread.h"

namespace jointkv::server {

class Views {
 public:
  using Take = std::function<void(const std::string&)>;

  // Both must outlive it; `on_io_thread` has something run there.
  Views(EngineThread& engine, std::function<void(std::function<void()>)> on_io_thread)
      : engine_(engine), on_io_thread_(std::move(on_io_thread)) {}

  void Status(Take take);
  // Of one domain, or of all.
  void Blocks(std::optional<DomainId> domain, Take take);

 private:
  struct View {
    std::string text;
    double made_s = 0;
    std::vector<Take> waiting;
  };

  void Give(View& view, std::function<std::string(const engine::Engine&)> make, Take take);

  EngineThread& engine_;
  std::function<void(std::function<void()>)> on_io_thread_;
  View status_;
  std::map<std::optional<DomainId>, View> blocks_;
};

}  // namespace jointkv::server
