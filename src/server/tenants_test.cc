#include "server/tenants.h"

#include <gtest/gtest.h>

#include <string>

namespace jointkv::server {
namespace {

constexpr const char* kKeys = R"([
  {"key": "key-of-alpha-1", "tenant": "alpha", "max_requests": 2, "max_queued_tokens": 100, "max_kv_bytes": 1000},
  {"key": "key-of-alpha-2", "tenant": "alpha", "admin": true},
  {"key": "key-of-beta-01", "tenant": "beta"}])";

Tenants TestTenants(const Limits& limits = {}) {
  Expected<Tenants> tenants = Tenants::Parse(kKeys, limits);
  CHECK(tenants.ok());
  return std::move(tenants).value();
}

TEST(Tenants, WithoutKeysAllAreLocalAdmins) {
  Tenants tenants{Limits()};
  const std::optional<Caller> caller = tenants.Authenticate("");
  ASSERT_TRUE(caller.has_value());
  EXPECT_EQ(caller->tenant->name, "local");
  EXPECT_TRUE(caller->admin);
}

TEST(Tenants, KeysNameTheirTenant) {
  Tenants tenants = TestTenants();
  const auto alpha = tenants.Authenticate("Bearer key-of-alpha-1");
  const auto admin = tenants.Authenticate("Bearer key-of-alpha-2");
  const auto beta = tenants.Authenticate("Bearer key-of-beta-01");
  ASSERT_TRUE(alpha && admin && beta);
  EXPECT_EQ(alpha->tenant, admin->tenant);
  EXPECT_FALSE(alpha->admin);
  EXPECT_TRUE(admin->admin);
  EXPECT_NE(alpha->tenant->domain, beta->tenant->domain);
}

TEST(Tenants, OtherKeysAreRefused) {
  Tenants tenants = TestTenants();
  for (const char* header : {"", "Bearer ", "Bearer key-of-alpha-", "Bearer key-of-alpha-12", "Bearer  key-of-alpha-1",
                             "key-of-alpha-1", "Basic key-of-alpha-1", "Bearer KEY-OF-ALPHA-1"}) {
    EXPECT_FALSE(tenants.Authenticate(header).has_value()) << header;
  }
}

TEST(Tenants, BadFilesAreRefusedWithTheEntry) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "not JSON"},
      {"{}", "expected an array"},
      {"[]", "no key"},
      {"[5]", "keys[0]"},
      {R"([{"tenant": "a"}])", "keys[0].key"},
      {R"([{"key": "short", "tenant": "a"}])", "keys[0].key"},
      {R"([{"key": "long enough"}])", "keys[0].tenant"},
      {R"([{"key": 12345678, "tenant": "a"}])", "keys[0].key"},
      {R"([{"key": "long enough", "tenant": "a", "max_requests": -1}])", "keys[0].max_requests"},
      {R"([{"key": "long enough", "tenant": "a", "max_requests": 0}])", "keys[0].max_requests"},
      {R"([{"key": "long enough", "tenant": "a", "max_kv_bytes": "1G"}])", "keys[0].max_kv_bytes"},
      {R"([{"key": "long enough", "tenant": "a", "max_queued_tokens": 1.5}])", "keys[0].max_queued_tokens"},
      {R"([{"key": "long enough", "tenant": "a", "admin": "yes"}])", "keys[0].admin"},
      {R"([{"key": "long enough", "tenant": "a"}, {"key": "long enough", "tenant": "b"}])", "keys[1].key"},
      {R"([{"key": "long enough", "tenant": "a"}, {"key": "also enough", "tenant": "a", "max_requests": 1}])",
       "keys[1]"},
  };
  for (const auto& [json, message] : cases) {
    const Expected<Tenants> tenants = Tenants::Parse(json, Limits());
    ASSERT_FALSE(tenants.ok()) << json;
    EXPECT_NE(tenants.status().message().find(message), std::string::npos) << tenants.status().message();
  }
  EXPECT_EQ(Tenants::Load("/nonexistent", Limits()).status().code(), StatusCode::kNotFound);
}

TEST(Tenants, EachLimitHoldsAndIsGivenBack) {
  Tenants tenants = TestTenants();
  Tenant& alpha = *tenants.Authenticate("Bearer key-of-alpha-1")->tenant;
  const Use one{.requests = 1, .queued_requests = 1, .queued_tokens = 40, .kv_bytes = 400};
  EXPECT_FALSE(tenants.Enter(alpha, one));
  EXPECT_FALSE(tenants.Enter(alpha, one));
  EXPECT_EQ(tenants.Enter(alpha, one)->status, 429);
  tenants.Leave(alpha, one);

  Use tokens = one;
  tokens.queued_tokens = 61;
  EXPECT_EQ(tenants.Enter(alpha, tokens)->status, 429);
  Use bytes = one;
  bytes.kv_bytes = 601;
  const std::optional<ApiError> error = tenants.Enter(alpha, bytes);
  EXPECT_EQ(error->status, 429);
  EXPECT_GT(error->retry_after_s, 0);
  EXPECT_NE(error->message.find("KV bytes"), std::string::npos);
  EXPECT_FALSE(tenants.Enter(alpha, one));
  tenants.Leave(alpha, one);
  tenants.Leave(alpha, one);
  EXPECT_EQ(alpha.use.requests, 0);
  EXPECT_EQ(tenants.total().kv_bytes, 0U);
}

// Trying again would not help.
TEST(Tenants, WhatCanNeverEnterIsABadRequest) {
  Tenants tenants = TestTenants();
  Tenant& alpha = *tenants.Authenticate("Bearer key-of-alpha-1")->tenant;
  EXPECT_EQ(tenants.Enter(alpha, {.requests = 3, .queued_requests = 3, .queued_tokens = 3, .kv_bytes = 3})->status,
            400);
  EXPECT_EQ(tenants.Enter(alpha, {.requests = 1, .queued_requests = 1, .queued_tokens = 101, .kv_bytes = 3})->status,
            400);
  EXPECT_EQ(tenants.Enter(alpha, {.requests = 1, .queued_requests = 1, .queued_tokens = 1, .kv_bytes = 1001})->status,
            400);
}

// What is not counted yet must not be refused for ever.
TEST(Tenants, WhatIsPreparedCountsByItsBytes) {
  Limits limits;
  limits.queued_tokens_max = 1000;
  Tenants tenants = TestTenants(limits);
  Tenant& alpha = *tenants.Authenticate("Bearer key-of-alpha-1")->tenant;
  Tenant& beta = *tenants.Authenticate("Bearer key-of-beta-01")->tenant;
  EXPECT_EQ(tenants.Preparing(beta, 0).queued_tokens, 1);
  EXPECT_EQ(tenants.Preparing(beta, 400).queued_tokens, 100);
  EXPECT_EQ(tenants.Preparing(beta, 1 << 20).queued_tokens, 1000);
  const Use most = tenants.Preparing(alpha, 1 << 20);
  EXPECT_EQ(most.queued_tokens, 100) << "the tenant's own limit";
  EXPECT_FALSE(tenants.Enter(alpha, most));
  EXPECT_EQ(tenants.Enter(alpha, most)->status, 429);
  EXPECT_EQ(tenants.Enter(beta, tenants.Preparing(beta, 1 << 20))->status, 503);
  tenants.Leave(alpha, most);
  EXPECT_FALSE(tenants.Enter(beta, tenants.Preparing(beta, 1 << 20)));
}

TEST(Tenants, TheQueueIsForAll) {
  Limits limits;
  limits.queued_requests_max = 2;
  limits.queued_tokens_max = 100;
  Tenants tenants = TestTenants(limits);
  Tenant& alpha = *tenants.Authenticate("Bearer key-of-alpha-1")->tenant;
  Tenant& beta = *tenants.Authenticate("Bearer key-of-beta-01")->tenant;
  const Use one{.requests = 1, .queued_requests = 1, .queued_tokens = 50, .kv_bytes = 1};
  EXPECT_FALSE(tenants.Enter(alpha, one));
  EXPECT_FALSE(tenants.Enter(beta, one));
  EXPECT_EQ(tenants.Enter(beta, one)->status, 503);
  tenants.Leave(alpha, {.requests = 0, .queued_requests = 1, .queued_tokens = 50, .kv_bytes = 0});
  EXPECT_FALSE(tenants.Enter(beta, one));
  EXPECT_EQ(tenants.total().requests, 3);
}

}  // namespace
}  // namespace jointkv::server
