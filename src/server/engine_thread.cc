#include "server/engine_thread.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "base/clock.h"

namespace jointkv::server {
namespace {

constexpr double kMetricsEveryS = 0.1;

}  // namespace

EngineThread::EngineThread(engine::EngineOptions options, std::string chat_template, double shadow_rate,
                           Metrics& metrics, Callbacks callbacks)
    : options_(std::move(options)),
      template_source_(std::move(chat_template)),
      shadow_rate_(shadow_rate),
      metrics_(metrics),
      callbacks_(std::move(callbacks)) {}

EngineThread::~EngineThread() { Stop(); }

void EngineThread::Start() {
  thread_ = std::thread([this] { Run(); });
}

void EngineThread::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void EngineThread::Submit(Ticket ticket, engine::Request request, bool reports_kv) {
  {
    const std::lock_guard lock(mutex_);
    inbox_.submissions.push_back({ticket, std::move(request), reports_kv});
  }
  wake_.notify_one();
}

void EngineThread::Cancel(Ticket ticket) {
  {
    const std::lock_guard lock(mutex_);
    inbox_.cancels.push_back(ticket);
  }
  wake_.notify_one();
}

void EngineThread::Ask(std::function<std::string(const engine::Engine&)> make, std::function<void(std::string)> take) {
  {
    const std::lock_guard lock(mutex_);
    inbox_.questions.push_back({std::move(make), std::move(take)});
  }
  wake_.notify_one();
}

void EngineThread::Run() {
  pthread_setname_np(pthread_self(), "engine");
  const Status loaded = Load();
  callbacks_.on_loaded(loaded);
  if (!loaded.ok()) return;
  UpdateMetrics();
  Inbox inbox;
  while (WaitForWork(inbox)) {
    TakeIn(inbox);
    events_.clear();
    engine_->Step(events_);
    shadow_->OnEvents(events_);
    Deliver();
    metrics_.UpdateShadow(shadow_->stats(), shadow_->TakeRunKls());
    shadow_->RunWhenIdle();
    if (engine_->idle() || MonotonicSeconds() - metrics_updated_s_ >= kMetricsEveryS) UpdateMetrics();
  }
}

Status EngineThread::Load() {
  ASSIGN_OR_RETURN(engine_, engine::Engine::Create(options_));
  shadow_ = std::make_unique<engine::ShadowCheck>(*engine_, engine::ShadowCheck::Options{.rate = shadow_rate_});
  ASSIGN_OR_RETURN(chat_template_, text::ChatTemplate::CreateAsGiven(engine_->tokenizer(), template_source_));
  const text::Tokenizer& tokenizer = engine_->tokenizer();
  model_.tokenizer = &tokenizer;
  model_.chat_template = chat_template_.get();
  model_.sampling_limits = options_.sampling_limits;
  model_.n_vocab = engine_->model().n_vocab();
  model_.embedding_size = static_cast<int>(engine_->model().hyperparameters().d_model);
  model_.context_max = ContextThatFits();
  model_.choices_max = options_.max_running;
  model_.token_kv_bytes = engine_->cache().shape().logical_token_bytes();
  for (TokenId token = 0; token < tokenizer.n_vocab(); ++token) {
    model_.longest_piece_bytes = std::max(model_.longest_piece_bytes, tokenizer.Piece(token).size());
  }
  return Status::Ok();
}

// The most tokens that one sequence may have: beyond, Submit refuses for want of KV memory.
int EngineThread::ContextThatFits() const {
  const size_t capacity = engine_->kv_stats().capacity_bytes;
  int fits = 0;
  int beyond = engine_->max_context() + 1;
  while (beyond - fits > 1) {
    const int middle = fits + (beyond - fits) / 2;
    (engine_->cache().MinimumBytes(middle) <= capacity ? fits : beyond) = middle;
  }
  return fits;
}

// False: to stop.
bool EngineThread::WaitForWork(Inbox& inbox) {
  std::unique_lock lock(mutex_);
  wake_.wait(lock, [&] { return stop_ || !inbox_.empty() || !engine_->idle(); });
  std::swap(inbox, inbox_);
  return !stop_;
}

void EngineThread::TakeIn(Inbox& inbox) {
  for (Submission& submission : inbox.submissions) {
    const int choices = submission.request.sampling.n;
    // The shadow check reads what the engine takes.
    std::optional<engine::Request> copy;
    if (shadow_rate_ > 0) copy = submission.request;
    const Expected<engine::RequestId> id = engine_->Submit(std::move(submission.request));
    if (id.ok() && copy) shadow_->OnSubmitted(*id, *copy);
    Delivery delivery{.ticket = submission.ticket};
    delivery.kind = id.ok() ? Delivery::Kind::kAccepted : Delivery::Kind::kRefused;
    delivery.refused = id.status();
    deliveries_.push_back(std::move(delivery));
    if (!id.ok()) continue;
    ids_.emplace(submission.ticket, *id);
    open_.emplace(*id, Open{submission.ticket, submission.reports_kv, choices,
                            std::vector<double>(static_cast<size_t>(choices), 0)});
  }
  for (const Ticket ticket : inbox.cancels) {
    const auto found = ids_.find(ticket);
    if (found != ids_.end()) engine_->Cancel(found->second);
  }
  // What a step takes must not delay these.
  if (!deliveries_.empty()) callbacks_.on_deliveries(std::exchange(deliveries_, {}));
  for (const Question& question : inbox.questions) question.take(question.make(*engine_));
  inbox.submissions.clear();
  inbox.cancels.clear();
  inbox.questions.clear();
}

void EngineThread::Deliver() {
  if (events_.empty()) return;
  std::optional<KvReport> report;
  for (engine::Event& event : events_) {
    const auto found = open_.find(event.request);
    CHECK(found != open_.end());
    Open& open = found->second;
    Delivery delivery{.ticket = open.ticket};
    if (open.reports_kv && event.finish == engine::FinishReason::kNone) {
      if (!report) {
        const kv::KvStats kv = engine_->kv_stats();
        const joint::FusionStats fusion = engine_->fusion_stats();
        report = {kv.logical_bytes, kv.running_bytes, fusion.offered, fusion.fused};
      }
      delivery.kv = report;
    }
    Count(event, open);
    if (open.choices_left == 0) {
      ids_.erase(open.ticket);
      open_.erase(found);
    }
    delivery.event = std::move(event);
    deliveries_.push_back(std::move(delivery));
  }
  callbacks_.on_deliveries(std::exchange(deliveries_, {}));
}

void EngineThread::Count(const engine::Event& event, Open& open) {
  if (event.token >= 0) {
    const double now_s = MonotonicSeconds();
    double& last_s = open.last_token_s[static_cast<size_t>(event.choice)];
    if (last_s > 0) metrics_.TokenEmitted(now_s - last_s);
    last_s = now_s;
  }
  if (event.finish == engine::FinishReason::kNone) return;
  --open.choices_left;
  metrics_.RequestFinished(event);
}

void EngineThread::UpdateMetrics() {
  metrics_updated_s_ = MonotonicSeconds();
  metrics_.Update(*engine_);
}

}  // namespace jointkv::server
