#include "engine/shadow_check.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace jointkv::engine {
namespace {

constexpr size_t kRunKlsMax = 4096;

double LogSumExp(std::span<const float> logits) {
  const double max = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

// KL(p || q) in nats.
double Divergence(std::span<const float> p, std::span<const float> q) {
  const double norm_p = LogSumExp(p);
  const double norm_q = LogSumExp(q);
  double kl = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double log_p = static_cast<double>(p[i]) - norm_p;
    const double weight = std::exp(log_p);
    if (weight > 0) kl += weight * (log_p - (static_cast<double>(q[i]) - norm_q));
  }
  return std::max(kl, 0.0);  // rounding
}

}  // namespace

ShadowCheck::ShadowCheck(Engine& engine, const Options& options)
    : engine_(engine), options_(options), n_vocab_(static_cast<size_t>(engine.model().n_vocab())) {
  if (options_.rate <= 0) return;
  engine_.ObserveLogits(
      [this](RequestId request, int choice, int, std::span<const float> logits) { Observe(request, choice, logits); });
}

ShadowCheck::~ShadowCheck() {
  if (options_.rate > 0) engine_.ObserveLogits(nullptr);
}

void ShadowCheck::OnSubmitted(RequestId id, const Request& request) {
  if (run_.valid()) {
    engine_.Cancel(run_);
    EndRun(false);
  }
  if (options_.rate <= 0 || !request.kv_fusion || request.embed || request.sampling.max_tokens == 0) return;
  due_ += options_.rate;
  if (due_ < 1) return;
  due_ -= 1;
  Record& record = recording_[id];
  record.request.prompt = request.prompt;
  record.request.domain = request.domain;
}

void ShadowCheck::Observe(RequestId request, int choice, std::span<const float> logits) {
  if (choice != 0) return;
  if (request == run_) {
    if (compared_ == current_.rows) return;
    const auto served = std::span<const float>(current_.logits).subspan(compared_ * n_vocab_, n_vocab_);
    kl_ += Divergence(logits, served);
    ++compared_;
    return;
  }
  const auto found = recording_.find(request);
  if (found == recording_.end()) return;
  Record& record = found->second;
  const size_t bytes = logits.size_bytes();
  if (record.rows == options_.tokens_max || stats_.bytes + bytes > options_.bytes_max) return;
  // Rows stay in order: after one that did not fit, none is kept.
  if (record.rows != static_cast<int>(record.tokens.size())) return;
  record.logits.insert(record.logits.end(), logits.begin(), logits.end());
  ++record.rows;
  stats_.bytes += bytes;
}

void ShadowCheck::OnEvents(std::vector<Event>& events) {
  if (options_.rate <= 0) return;
  for (const Event& event : events) {
    if (event.request == run_) {
      if (event.finish != FinishReason::kNone) EndRun(event.finish == FinishReason::kLength);
      continue;
    }
    const auto found = recording_.find(event.request);
    if (found == recording_.end() || event.choice != 0) continue;
    if (event.token >= 0) found->second.tokens.push_back(event.token);
    if (event.finish == FinishReason::kNone) continue;
    Record record = std::move(found->second);
    recording_.erase(found);
    const bool complete = event.finish == FinishReason::kStop || event.finish == FinishReason::kLength;
    if (!complete || record.rows == 0 || static_cast<int>(waiting_.size()) >= options_.waiting_max) {
      Drop(record);
      continue;
    }
    record.tokens.resize(static_cast<size_t>(record.rows));
    waiting_.push_back(std::move(record));
  }
  std::erase_if(events, [this](const Event& event) { return own_.contains(event.request); });
  stats_.waiting = static_cast<int>(waiting_.size());
}

bool ShadowCheck::RunWhenIdle() {
  if (run_.valid()) return true;
  if (!engine_.idle()) return false;
  own_.clear();  // no event of an earlier run can come any more
  while (!waiting_.empty()) {
    current_ = std::move(waiting_.front());
    waiting_.pop_front();
    stats_.waiting = static_cast<int>(waiting_.size());
    Request request = current_.request;
    request.forced = current_.tokens;
    request.kv_fusion = false;
    request.shadow = true;
    request.sampling.temperature = 0;
    request.sampling.max_tokens = current_.rows;
    request.sampling.ignore_eos = true;
    const auto id = engine_.Submit(std::move(request));
    if (!id.ok()) {
      Drop(current_);
      continue;
    }
    run_ = *id;
    own_.insert(run_);
    compared_ = 0;
    kl_ = 0;
    return true;
  }
  return false;
}

void ShadowCheck::EndRun(bool complete) {
  run_ = RequestId();
  if (!complete || compared_ != current_.rows) {
    Drop(current_);
  } else {
    ++stats_.runs;
    stats_.rows += current_.rows;
    stats_.kl_sum += kl_;
    if (run_kls_.size() < kRunKlsMax) run_kls_.push_back(kl_ / current_.rows);
    stats_.bytes -= current_.logits.size() * sizeof(float);
  }
  current_ = Record();
}

void ShadowCheck::Drop(const Record& record) {
  ++stats_.dropped;
  stats_.bytes -= record.logits.size() * sizeof(float);
}

std::vector<double> ShadowCheck::TakeRunKls() { return std::exchange(run_kls_, {}); }

}  // namespace jointkv::engine
