#include "cli/batch.h"

#include <spdlog/fmt/fmt.h>

#include <utility>

#include "base/clock.h"
#include "cli/terminal.h"

namespace jointkv::cli {

Batch::Batch(engine::Engine& engine) : engine_(engine), start_s_(MonotonicSeconds()) {}

Status Batch::Submit(size_t index, engine::Request request) {
  const int n = request.sampling.n;
  ASSIGN_OR_RETURN(const engine::RequestId id, engine_.Submit(std::move(request)));
  submitted_.emplace(id, index);
  choices_ += static_cast<size_t>(n);
  return Status::Ok();
}

void Batch::Run(const Observer& observer) {
  ProgressLine progress;
  std::vector<engine::Event> events;
  bool cancelled = false;
  if (observer.on_logits) {
    engine_.ObserveLogits([&](engine::RequestId id, int, int position, std::span<const float> logits) {
      observer.on_logits(submitted_.at(id), position, logits);
    });
  }
  while (!engine_.idle()) {
    if (Interrupted() && !cancelled) {
      for (const auto& [id, index] : submitted_) engine_.Cancel(id);
      cancelled = true;
    }
    events.clear();
    engine_.Step(events);
    for (engine::Event& event : events) Take(std::move(event), observer);
    if (observer.on_step) observer.on_step();
    if (choices_ > 1 && progress.due()) progress.Show(ProgressText());
  }
  wall_s_ = MonotonicSeconds() - start_s_;
  engine_.ObserveLogits(nullptr);
}

std::string Batch::ProgressText() const {
  const engine::EngineStats stats = engine_.stats();
  const double elapsed_s = MonotonicSeconds() - start_s_;
  return fmt::format("{}/{} done, {} running, {} waiting, {:.0f} output tokens a second", ended_, choices_,
                     stats.running, stats.waiting, static_cast<double>(stats.output_tokens) / elapsed_s);
}

void Batch::Take(engine::Event&& event, const Observer& observer) {
  const auto key = std::make_pair(event.request, event.choice);
  Choice& choice = open_[key];
  choice.request = submitted_.at(event.request);
  choice.text += event.text;
  if (event.token >= 0) {
    choice.tokens.push_back(event.token);
    choice.logprobs.push_back(std::move(event.logprobs));
  }
  if (observer.on_text && !event.text.empty()) observer.on_text(choice.request, event.choice, event.text);
  if (event.finish == engine::FinishReason::kNone) return;

  ++ended_;
  if (event.finish == engine::FinishReason::kError) all_ok_ = false;
  builder_.Add(event);
  choice.end = std::move(event);
  if (observer.on_end) observer.on_end(choice);
  open_.erase(key);
}

Summary Batch::summary() const { return builder_.Build(engine_.stats(), wall_s_); }

}  // namespace jointkv::cli
