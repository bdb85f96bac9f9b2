// The thread that owns the engine: requests go in through an inbox, events come out a step at a time.
//
// EngineThread. Threads: Submit, Cancel and Ask from any; the callbacks are called on the engine thread and must not
// block. Owns: the engine, its chat template, the thread. Fails how: a model that does not load is on_loaded's Status;
// a request that the engine refuses is a delivery.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "engine/engine.h"
#include "engine/shadow_check.h"
#include "server/metrics.h"
#include "text/chat_template.h"

namespace jointkv::server {

using Ticket = uint64_t;  // names a request from before the engine has seen it

// The store while a request ran, all its company included.
struct KvReport {
  size_t logical_bytes = 0;  // resident tokens as private 16-bit K and V
  size_t running_bytes = 0;  // what they take
  int64_t offered = 0;       // blocks that fusion has looked at since the start
  int64_t fused = 0;
};

// What has become of a request. The first delivery is its acceptance or its refusal.
struct Delivery {
  enum class Kind : uint8_t { kAccepted, kRefused, kEvent };

  Ticket ticket = 0;
  Kind kind = Kind::kEvent;
  Status refused = {};
  engine::Event event = {};
  std::optional<KvReport> kv = {};  // of requests that asked for it, while they run
};

// What other threads may know of a loaded model. Valid while the EngineThread lives.
struct ModelInfo {
  const text::Tokenizer* tokenizer = nullptr;
  const text::ChatTemplate* chat_template = nullptr;
  engine::SamplingLimits sampling_limits;
  int n_vocab = 0;
  int embedding_size = 0;
  int context_max = 0;  // prompt and output: what the model, --max-context and the KV memory allow one sequence
  int choices_max = 0;
  size_t token_kv_bytes = 0;       // private 16-bit K and V of one token
  size_t longest_piece_bytes = 0;  // of any token
};

class EngineThread {
 public:
  struct Callbacks {
    std::function<void(const Status&)> on_loaded;
    std::function<void(std::vector<Delivery>&&)> on_deliveries;
  };

  // `chat_template`: its text; empty: the model file's. `shadow_rate`: see engine::ShadowCheck.
  EngineThread(engine::EngineOptions options, std::string chat_template, double shadow_rate, Metrics& metrics,
               Callbacks callbacks);
  ~EngineThread();  // as Stop
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  void Start();
  // Ends after the present step; what is open gets no further delivery.
  void Stop();

  void Submit(Ticket ticket, engine::Request request, bool reports_kv = false);
  void Cancel(Ticket ticket);
  // Has `make` run between two steps and hands what it returns to `take`, both on the engine thread.
  void Ask(std::function<std::string(const engine::Engine&)> make, std::function<void(std::string)> take);

  // After on_loaded has said Ok.
  const ModelInfo& model() const { return model_; }

 private:
  struct Submission {
    Ticket ticket = 0;
    engine::Request request;
    bool reports_kv = false;
  };
  struct Question {
    std::function<std::string(const engine::Engine&)> make;
    std::function<void(std::string)> take;
  };
  struct Inbox {
    std::vector<Submission> submissions;
    std::vector<Ticket> cancels;
    std::vector<Question> questions;
    bool empty() const { return submissions.empty() && cancels.empty() && questions.empty(); }
  };
  struct Open {
    Ticket ticket = 0;
    bool reports_kv = false;
    int choices_left = 0;
    std::vector<double> last_token_s;  // by choice; 0: none yet
  };

  void Run();
  Status Load();
  int ContextThatFits() const;
  bool WaitForWork(Inbox& inbox);
  void TakeIn(Inbox& inbox);
  void Deliver();
  void Count(const engine::Event& event, Open& open);
  void UpdateMetrics();

  engine::EngineOptions options_;
  std::string template_source_;
  double shadow_rate_;
  Metrics& metrics_;
  Callbacks callbacks_;

  std::mutex mutex_;
  std::condition_variable wake_;
  Inbox inbox_;        // guarded by mutex_
  bool stop_ = false;  // guarded by mutex_

  // The engine thread's.
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<engine::ShadowCheck> shadow_;
  std::unique_ptr<text::ChatTemplate> chat_template_;
  ModelInfo model_;
  std::unordered_map<engine::RequestId, Open> open_;
  std::unordered_map<Ticket, engine::RequestId> ids_;
  std::vector<engine::Event> events_;
  std::vector<Delivery> deliveries_;
  double metrics_updated_s_ = 0;

  std::thread thread_;
};

}  // namespace jointkv::server
