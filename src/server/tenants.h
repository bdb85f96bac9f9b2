// Who may use the server, and how much at once.
//
// Tenants. Threads: the I/O thread. Owns: digests of the keys (never the keys), the tenants and their present use.
// Fails how: Load returns a Status that names the entry; Enter an ApiError of 429 or 503, or 400 for what could never
// enter.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/status.h"
#include "server/api_error.h"
#include "server/limits.h"

namespace jointkv::server {

// What requests take. KV bytes: of prompt and max_tokens of every choice, as private 16-bit K and V; fusion and shared
// prefixes make it less, never more.
struct Use {
  int requests = 0;           // open
  int queued_requests = 0;    // of those, without a first token
  int64_t queued_tokens = 0;  // their prompts
  uint64_t kv_bytes = 0;
};

struct TenantLimits {
  int requests_max = 0;  // 0: no limit of its own, as for the others
  int64_t queued_tokens_max = 0;
  uint64_t kv_bytes_max = 0;
};

struct Tenant {
  std::string name;
  DomainId domain;  // nothing is shared with another domain
  TenantLimits limits;
  Use use;
};

struct Caller {
  Tenant* tenant = nullptr;
  bool admin = false;  // may see what all tenants do
};

class Tenants {
 public:
  // Without keys: one tenant, "local", whose every caller is an admin.
  explicit Tenants(const Limits& limits);
  // [{"key": "...", "tenant": "...", "admin": false, "max_requests": 8, "max_queued_tokens": 100000,
  //   "max_kv_bytes": 1073741824}]
  static Expected<Tenants> Load(const std::string& path, const Limits& limits);
  static Expected<Tenants> Parse(std::string_view json, const Limits& limits);

  // By an Authorization header. The time it takes does not depend on how much of a key is right.
  std::optional<Caller> Authenticate(std::string_view authorization);

  // Of a request that is being prepared beside the I/O thread, while its tokens are not known: by the bytes of its
  // body, and never more than may be queued at all.
  Use Preparing(const Tenant& tenant, size_t body_bytes) const;

  // All or nothing. Leave gives back.
  std::optional<ApiError> Enter(Tenant& tenant, const Use& use);
  void Leave(Tenant& tenant, const Use& use);

  const Use& total() const { return total_; }
  const std::deque<Tenant>& tenants() const { return tenants_; }
  bool open_to_all() const { return keys_.empty(); }

 private:
  using Digest = std::array<unsigned char, 32>;
  struct Key {
    Digest digest;
    size_t tenant = 0;
    bool admin = false;
  };

  static Digest DigestOf(std::string_view text);

  Limits limits_;
  std::deque<Tenant> tenants_;  // addresses stay
  std::vector<Key> keys_;
  Use total_;
};

}  // namespace jointkv::server
