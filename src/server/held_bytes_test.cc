#include "server/held_bytes.h"

#include <gtest/gtest.h>

namespace jointkv::server {
namespace {

TEST(HeldBytes, GrantsWhatIsLeft) {
  HeldBytes budget(100);
  HeldBytes::Hold a(budget);
  HeldBytes::Hold b(budget);
  EXPECT_TRUE(a.Set(60));
  EXPECT_FALSE(b.Set(41));
  EXPECT_EQ(budget.used(), 60u);
  EXPECT_TRUE(b.Set(40));
  EXPECT_FALSE(a.Set(61));
  EXPECT_EQ(a.bytes(), 60u);
  EXPECT_TRUE(a.Set(10));
  EXPECT_TRUE(b.Set(90));
  EXPECT_EQ(budget.used(), 100u);
}

TEST(HeldBytes, IsGivenBackOnce) {
  HeldBytes budget(100);
  {
    HeldBytes::Hold a(budget);
    ASSERT_TRUE(a.Set(70));
    HeldBytes::Hold b = std::move(a);
    EXPECT_EQ(budget.used(), 70u);
    HeldBytes::Hold c(budget);
    ASSERT_TRUE(c.Set(5));
    c = std::move(b);
    EXPECT_EQ(c.bytes(), 70u);
  }
  EXPECT_EQ(budget.used(), 0u);
}

TEST(HeldBytes, WithoutABudgetThereIsNoLimit) {
  HeldBytes::Hold hold;
  EXPECT_TRUE(hold.Set(size_t{1} << 60));
}

}  // namespace
}  // namespace jointkv::server
