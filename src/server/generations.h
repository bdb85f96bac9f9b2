// The calls that the engine works on: from their admission to their last event.
//
// Generations. Threads: the I/O thread. Owns: the open calls and what they count against their tenants; engine thread
// and tenants must outlive it. Fails how: Start answers a call that does not fit the queue with an error. A client that
// leaves has its requests cancelled.
#pragma once

#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "server/answer.h"
#include "server/engine_thread.h"
#include "server/exchange.h"
#include "server/prepare.h"
#include "server/tenants.h"

namespace jointkv::server {

class Generations {
 public:
  Generations(EngineThread& engine, Tenants& tenants);
  ~Generations();

  // Throws an ApiError when there is no room; `exchange` is then still to be answered.
  void Start(Exchange& exchange, Tenant& tenant, const GenerationCall& call, Prepared prepared, Answer::Head head);
  void OnDeliveries(std::vector<Delivery>&& deliveries);

  bool empty() const { return open_.empty(); }
  // Ends all that is open; the clients are told so.
  void CancelAll(const ApiError& why);

 private:
  struct Call;
  struct Part;  // one prompt of a call: a request of the engine

  void OnEvent(Part& part, const Delivery& delivery);
  void Fail(Call& call, const ApiError& error);
  void Finish(Call& call);
  void Abandon(Call& call);
  void CancelParts(const Call& call);
  void LeaveQueue(Part& part);

  EngineThread& engine_;
  Tenants& tenants_;
  Ticket next_ticket_ = 1;
  std::unordered_map<Ticket, std::unique_ptr<Part>> open_;
  std::unordered_set<Call*> touched_;  // calls that the present deliveries gave events to send
};

}  // namespace jointkv::server
