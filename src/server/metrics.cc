#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <map>
#include <utility>

namespace jointkv::server {

struct Metrics::Families {
  explicit Families(std::string model_name) : labels{{"model_name", std::move(model_name)}} {}

  prometheus::Gauge& Gauge(const std::string& name, const std::string& help) {
    return prometheus::BuildGauge().Name(name).Help(help).Labels(labels).Register(registry).Add({});
  }

  std::map<std::string, std::string> labels;
  prometheus::Registry registry;
  prometheus::Gauge& running = Gauge("vllm:num_requests_running", "sequences in the batch");
  prometheus::Gauge& waiting = Gauge("vllm:num_requests_waiting", "sequences in the queue");
  prometheus::Gauge& kv_running = Gauge("jointkv_kv_running_bytes", "KV blocks that running sequences refer to");
  prometheus::Gauge& kv_logical = Gauge("jointkv_kv_logical_bytes", "the same tokens as private 16-bit K and V");
  prometheus::Family<prometheus::Counter>& finished = prometheus::BuildCounter()
                                                          .Name("vllm:request_success_total")
                                                          .Help("requests that have ended, by reason")
                                                          .Labels(labels)
                                                          .Register(registry);
};

Metrics::Metrics(std::string model_name) : families_(std::make_unique<Families>(std::move(model_name))) {}
Metrics::~Metrics() = default;

void Metrics::RequestFinished(const engine::Event& last_event) {
  families_->finished.Add({{"finished_reason", engine::FinishReasonName(last_event.finish)}}).Increment();
}

void Metrics::TokenEmitted(double) {}

void Metrics::Update(const engine::EngineStats& engine, const kv::KvStats& kv, const joint::FusionStats&) {
  families_->running.Set(engine.running);
  families_->waiting.Set(engine.waiting);
  families_->kv_running.Set(static_cast<double>(kv.running_bytes));
  families_->kv_logical.Set(static_cast<double>(kv.logical_bytes));
}

std::string Metrics::Render() { return prometheus::TextSerializer().Serialize(families_->registry.Collect()); }

}  // namespace jointkv::server
