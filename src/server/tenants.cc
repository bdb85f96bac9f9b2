#include "server/tenants.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>

#include "server/json_fields.h"

namespace jointkv::server {
namespace {

constexpr size_t kFileBytesMax = size_t{4} << 20;
constexpr size_t kKeysMax = 10000;
constexpr size_t kKeyBytesMin = 8;
constexpr size_t kBytesPerToken = 4;  // of English text, about

int64_t CountOr0(const Json& entry, const char* name, const std::string& field) {
  const Json* value = Find(entry, name);
  if (value == nullptr) return 0;
  const std::string at = field + "." + name;
  if (!value->is_number_integer() || (!value->is_number_unsigned() && value->get<int64_t>() < 0) ||
      (value->is_number_unsigned() && value->get<uint64_t>() > (uint64_t{1} << 62)) || *value == 0) {
    throw BadField(at, "expected a whole number above 0, got " + value->dump());
  }
  return value->get<int64_t>();
}

TenantLimits LimitsOf(const Json& entry, const std::string& field) {
  TenantLimits limits;
  const int64_t requests = CountOr0(entry, "max_requests", field);
  if (requests > (1 << 20)) throw BadField(field + ".max_requests", "is more than 1048576");
  limits.requests_max = static_cast<int>(requests);
  limits.queued_tokens_max = CountOr0(entry, "max_queued_tokens", field);
  limits.kv_bytes_max = static_cast<uint64_t>(CountOr0(entry, "max_kv_bytes", field));
  return limits;
}

bool HasLimits(const TenantLimits& limits) {
  return limits.requests_max != 0 || limits.queued_tokens_max != 0 || limits.kv_bytes_max != 0;
}

}  // namespace

Tenants::Tenants(const Limits& limits) : limits_(limits) {
  tenants_.push_back({.name = "local", .domain = DomainId(0), .limits = {}, .use = {}});
}

Expected<Tenants> Tenants::Load(const std::string& path, const Limits& limits) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return Status(StatusCode::kNotFound, "--api-keys '" + path + "': cannot be read");
  std::string text(kFileBytesMax + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) {
    return Status(StatusCode::kOutOfRange,
                  "--api-keys '" + path + "': more than " + std::to_string(kFileBytesMax) + " bytes");
  }
  Expected<Tenants> tenants = Parse(text, limits);
  if (tenants.ok()) return tenants;
  return Status(tenants.status().code(), "--api-keys '" + path + "': " + tenants.status().message());
}

Expected<Tenants> Tenants::Parse(std::string_view json, const Limits& limits) try {
  const Json entries = Json::parse(json, nullptr, false);
  if (entries.is_discarded()) return Status(StatusCode::kInvalidArgument, "is not JSON");
  Array(entries, "keys", kKeysMax);
  if (entries.empty()) return Status(StatusCode::kInvalidArgument, "holds no key");
  Tenants out(limits);
  out.tenants_.clear();
  std::map<std::string, size_t> by_name;
  for (size_t i = 0; i < entries.size(); ++i) {
    const std::string field = At("keys", i);
    const Json& entry = Object(entries[i], field);
    const std::string key = StringOr(entry, "key", field);
    if (key.size() < kKeyBytesMin) throw BadField(field + ".key", "has less than 8 bytes");
    const std::string name = StringOr(entry, "tenant", field);
    if (name.empty() || name.size() > 64) throw BadField(field + ".tenant", "expected 1 to 64 bytes");
    const TenantLimits own = LimitsOf(entry, field);
    const auto [found, added] = by_name.emplace(name, out.tenants_.size());
    if (added) {
      out.tenants_.push_back(
          {.name = name, .domain = DomainId(static_cast<int32_t>(found->second)), .limits = own, .use = {}});
    } else if (HasLimits(own)) {
      throw BadField(field, "the limits of tenant '" + name + "' stand in its first entry");
    }
    const Json* admin = Find(entry, "admin");
    const bool is_admin = admin != nullptr && Bool(*admin, field + ".admin");
    const Digest digest = DigestOf(key);
    for (const Key& other : out.keys_) {
      if (other.digest == digest) throw BadField(field + ".key", "stands in another entry too");
    }
    out.keys_.push_back({digest, found->second, is_admin});
  }
  return out;
} catch (const ApiError& error) {
  return Status(StatusCode::kInvalidArgument, error.message);
}

Tenants::Digest Tenants::DigestOf(std::string_view text) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

std::optional<Caller> Tenants::Authenticate(std::string_view authorization) {
  if (open_to_all()) return Caller{&tenants_.front(), true};
  constexpr std::string_view kBearer = "bearer ";  // in any case
  if (authorization.size() < kBearer.size()) return std::nullopt;
  for (size_t i = 0; i < kBearer.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(authorization[i])) != kBearer[i]) return std::nullopt;
  }
  const Digest digest = DigestOf(authorization.substr(kBearer.size()));
  const Key* match = nullptr;
  for (const Key& key : keys_) {
    if (CRYPTO_memcmp(key.digest.data(), digest.data(), digest.size()) == 0) match = &key;
  }
  if (match == nullptr) return std::nullopt;
  return Caller{&tenants_[match->tenant], match->admin};
}

Use Tenants::Preparing(const Tenant& tenant, size_t body_bytes) const {
  int64_t tokens = static_cast<int64_t>(std::max<size_t>(body_bytes / kBytesPerToken, 1));
  tokens = std::min(tokens, limits_.queued_tokens_max);
  if (tenant.limits.queued_tokens_max > 0) tokens = std::min(tokens, tenant.limits.queued_tokens_max);
  return {.requests = 1, .queued_requests = 1, .queued_tokens = tokens};
}

std::optional<ApiError> Tenants::Enter(Tenant& tenant, const Use& use) {
  const TenantLimits& own = tenant.limits;
  const auto never = [](const std::string& what) { return ApiError{.message = what, .code = "limit_exceeded"}; };
  if (use.queued_requests > limits_.queued_requests_max) {
    return never("prompt: " + std::to_string(use.queued_requests) + " requests at once, the queue holds " +
                 std::to_string(limits_.queued_requests_max));
  }
  if (use.queued_tokens > limits_.queued_tokens_max) {
    return never("prompt: " + std::to_string(use.queued_tokens) + " tokens at once, the queue holds " +
                 std::to_string(limits_.queued_tokens_max));
  }
  struct Check {
    const char* what;
    uint64_t asked, used, most;
  };
  const Check checks[] = {
      {"open requests", static_cast<uint64_t>(use.requests), static_cast<uint64_t>(tenant.use.requests),
       static_cast<uint64_t>(own.requests_max)},
      {"queued tokens", static_cast<uint64_t>(use.queued_tokens), static_cast<uint64_t>(tenant.use.queued_tokens),
       static_cast<uint64_t>(own.queued_tokens_max)},
      {"KV bytes", use.kv_bytes, tenant.use.kv_bytes, own.kv_bytes_max},
  };
  for (const Check& check : checks) {
    if (check.most == 0 || check.used + check.asked <= check.most) continue;
    const std::string limit = "tenant '" + tenant.name + "' may have " + std::to_string(check.most) + " " + check.what;
    if (check.asked > check.most) return never(limit + ", this asks for " + std::to_string(check.asked));
    return RateLimited(limit + ": " + std::to_string(check.used) + " are in use, this asks for " +
                       std::to_string(check.asked));
  }
  if (total_.queued_requests + use.queued_requests > limits_.queued_requests_max ||
      total_.queued_tokens + use.queued_tokens > limits_.queued_tokens_max) {
    return Unavailable("overloaded", "the queue is full: " + std::to_string(total_.queued_requests) + " requests of " +
                                         std::to_string(total_.queued_tokens) + " tokens wait");
  }
  for (Use* sum : {&tenant.use, &total_}) {
    sum->requests += use.requests;
    sum->queued_requests += use.queued_requests;
    sum->queued_tokens += use.queued_tokens;
    sum->kv_bytes += use.kv_bytes;
  }
  return std::nullopt;
}

void Tenants::Leave(Tenant& tenant, const Use& use) {
  for (Use* sum : {&tenant.use, &total_}) {
    sum->requests -= use.requests;
    sum->queued_requests -= use.queued_requests;
    sum->queued_tokens -= use.queued_tokens;
    sum->kv_bytes -= use.kv_bytes;
  }
}

}  // namespace jointkv::server
