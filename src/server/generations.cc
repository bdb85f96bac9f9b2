#include "server/generations.h"

#include <string>
#include <utility>

#include "base/clock.h"

namespace jointkv::server {

// Lives while one of its parts is open or its client is being answered.
struct Generations::Call {
  Exchange exchange;
  Tenant& tenant;
  Answer answer;
  HeldBytes::Hold held;
  std::vector<Ticket> tickets;
  double received_s = MonotonicSeconds();
  bool began = false;     // a stream's headers are out
  bool answered = false;  // or the client is gone
};

struct Generations::Part {
  std::shared_ptr<Call> call;
  Ticket ticket = 0;
  size_t prompt = 0;  // its number in the call
  Use use;
  int choices_left = 0;
};

Generations::Generations(EngineThread& engine, Tenants& tenants) : engine_(engine), tenants_(tenants) {}
Generations::~Generations() = default;

void Generations::Start(Exchange& exchange, Tenant& tenant, const GenerationCall& call, Prepared prepared,
                        Answer::Head head) {
  std::vector<engine::Request>& requests = prepared.requests;
  const ModelInfo& model = engine_.model();
  std::vector<int> prompt_tokens;
  std::vector<Use> uses;
  Use sum;
  for (const engine::Request& request : requests) {
    const engine::SamplingParams& sampling = request.sampling;
    prompt_tokens.push_back(static_cast<int>(request.prompt.size()));
    const auto tokens = static_cast<uint64_t>(prompt_tokens.back()) +
                        static_cast<uint64_t>(sampling.n) * static_cast<uint64_t>(sampling.max_tokens);
    const Use use{.requests = 1,
                  .queued_requests = 1,
                  .queued_tokens = prompt_tokens.back(),
                  .kv_bytes = tokens * model.token_kv_bytes};
    uses.push_back(use);
    sum.requests += use.requests;
    sum.queued_requests += use.queued_requests;
    sum.queued_tokens += use.queued_tokens;
    sum.kv_bytes += use.kv_bytes;
  }
  if (const std::optional<ApiError> error = tenants_.Enter(tenant, sum)) throw *error;

  auto open = std::make_shared<Call>(
      Call{exchange, tenant, Answer(call, std::move(head), prepared, *model.tokenizer), std::move(prepared.held), {}});
  open->exchange.line().generates = true;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Ticket ticket = next_ticket_++;
    open->tickets.push_back(ticket);
    requests[i].domain = tenant.domain;
    open_.emplace(ticket, std::make_unique<Part>(Part{open, ticket, i, uses[i], requests[i].sampling.n}));
    engine_.Submit(ticket, std::move(requests[i]), call.reports_kv);
  }
  open->exchange.channel().OnGone([this, weak = std::weak_ptr<Call>(open)] {
    if (const std::shared_ptr<Call> gone = weak.lock()) Abandon(*gone);
  });
}

void Generations::OnDeliveries(std::vector<Delivery>&& deliveries) {
  std::vector<std::shared_ptr<Call>> keep;  // until they are flushed
  for (const Delivery& delivery : deliveries) {
    const auto found = open_.find(delivery.ticket);
    if (found == open_.end()) continue;
    Part& part = *found->second;
    Call& call = *part.call;
    if (touched_.insert(&call).second) keep.push_back(part.call);
    switch (delivery.kind) {
      case Delivery::Kind::kAccepted:
        if (call.answered || call.began || !call.answer.streams()) break;
        call.began = true;
        call.exchange.BeginStream();
        break;
      case Delivery::Kind::kRefused:
        LeaveQueue(part);
        tenants_.Leave(call.tenant, part.use);
        if (!call.answered) Fail(call, FromEngine(delivery.refused));
        open_.erase(found);
        break;
      case Delivery::Kind::kEvent:
        OnEvent(part, delivery);
        if (part.choices_left == 0) {
          tenants_.Leave(call.tenant, part.use);
          open_.erase(found);
        }
        break;
    }
  }
  touched_.clear();
  for (const std::shared_ptr<Call>& call : keep) {
    if (!call->answered) call->exchange.channel().Flush();
  }
}

void Generations::OnEvent(Part& part, const Delivery& delivery) {
  const engine::Event& event = delivery.event;
  Call& call = *part.call;
  LeaveQueue(part);
  if (event.finish != engine::FinishReason::kNone) --part.choices_left;
  if (call.answered) return;
  RequestLine& line = call.exchange.line();
  if (event.token >= 0 && line.ttft_s == 0) line.ttft_s = MonotonicSeconds() - call.received_s;
  if (event.finish == engine::FinishReason::kError) {
    const bool full = event.error.code() == StatusCode::kResourceExhausted;
    Fail(call, full ? Unavailable("kv_memory_full", event.error.message()) : FromEngine(event.error));
    return;
  }
  std::string events;
  call.answer.Take(part.prompt, delivery, events);
  if (!events.empty()) call.exchange.channel().Send(events);
  if (!call.answered && call.answer.complete()) Finish(call);
}

// Queued are those without a token.
void Generations::LeaveQueue(Part& part) {
  const Use queued{.requests = 0, .queued_requests = part.use.queued_requests, .queued_tokens = part.use.queued_tokens};
  if (queued.queued_requests == 0) return;
  tenants_.Leave(part.call->tenant, queued);
  part.use.queued_requests = 0;
  part.use.queued_tokens = 0;
}

void Generations::Fail(Call& call, const ApiError& error) {
  call.answered = true;
  CancelParts(call);
  call.exchange.line().finish = "error";
  if (!call.began) {
    call.exchange.ReplyError(error);
    return;
  }
  call.exchange.channel().Send(ErrorEvent(error) + "data: [DONE]\n\n");
  call.exchange.EndStream();
}

void Generations::Finish(Call& call) {
  call.answered = true;
  const Answer::Counts counts = call.answer.counts();
  RequestLine& line = call.exchange.line();
  line.prompt_tokens = counts.prompt_tokens;
  line.cached_tokens = counts.cached_tokens;
  line.output_tokens = counts.output_tokens;
  line.finish = call.answer.finish_reason();
  if (!call.began) {
    call.exchange.Reply(call.answer.Body());
    return;
  }
  std::string events;
  call.answer.AppendEnd(events);
  call.exchange.channel().Send(events);
  call.exchange.EndStream();
}

// The client has left.
void Generations::Abandon(Call& call) {
  if (call.answered) return;
  call.answered = true;
  CancelParts(call);
  const Answer::Counts counts = call.answer.counts();
  RequestLine& line = call.exchange.line();
  line.prompt_tokens = counts.prompt_tokens;
  line.output_tokens = counts.output_tokens;
  line.finish = "cancelled";
  call.exchange.Gone();
}

void Generations::CancelParts(const Call& call) {
  for (const Ticket ticket : call.tickets) {
    if (open_.contains(ticket)) engine_.Cancel(ticket);
  }
}

void Generations::CancelAll(const ApiError& why) {
  std::vector<std::shared_ptr<Call>> calls;
  for (const auto& [ticket, part] : open_) calls.push_back(part->call);
  for (const std::shared_ptr<Call>& call : calls) {
    if (!call->answered) Fail(*call, why);
  }
}

}  // namespace jointkv::server
