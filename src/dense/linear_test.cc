#include "dense/linear.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/cpu.h"
#include "dense/test_matrices.h"
#include "dense/test_weight.h"

namespace jointkv::dense {
namespace {

constexpr int kThreadsMax = 3;
constexpr int kRowsMax = 512;
constexpr int kIn = 512;

struct Part {
  ggml_type type = GGML_TYPE_F32;
  int out = 0;
  bool bias = false;
};

// A Linear and its plain double twin.
class Model {
 public:
  Model(const std::vector<Part>& parts, const LinearOptions& options, int in = kIn) : in_(in), options_(options) {
    std::vector<const gguf::Tensor*> tensors;
    std::vector<const gguf::Tensor*> biases;
    uint64_t seed = 77;
    for (const Part& part : parts) {
      weights_.push_back(std::make_unique<Weight>(part.type, in, part.out, seed++));
      tensors.push_back(&weights_.back()->tensor);
      biases_.push_back(std::make_unique<Weight>(GGML_TYPE_F32, part.out, 1, seed++));
      biases.push_back(part.bias ? &biases_.back()->tensor : nullptr);
      w_.insert(w_.end(), weights_.back()->values.begin(), weights_.back()->values.end());
      for (const float b : biases_.back()->values) b_.push_back(part.bias ? b : 0.0f);
    }
    ThreadPool pool(2);
    Expected<Linear> linear = Linear::Create(tensors, biases, options, pool);
    EXPECT_TRUE(linear.ok()) << linear.status().ToString();
    linear_ = std::move(linear).value();
    if (linear_.precision() == Precision::kBf16) RoundToBf16(w_);
    EXPECT_EQ(linear_.in(), in);
    EXPECT_EQ(static_cast<size_t>(linear_.out()), b_.size());
    scratch_.Reserve(kThreadsMax, kRowsMax, 64, in, options);
  }

  const Linear& linear() const { return linear_; }
  int out() const { return linear_.out(); }
  Precision precision() const { return options_.precision; }

  std::vector<float> Forward(int threads, const Activations& x, int quantised_rows,
                             const std::vector<float>* before = nullptr) {
    ThreadPool pool(threads);
    std::vector<float> y(static_cast<size_t>(x.rows) * out(), -3.0f);
    if (before != nullptr) y.assign(before->begin(), before->begin() + static_cast<ptrdiff_t>(y.size()));
    linear_.Forward(pool, scratch_, x, quantised_rows, y.data(), before != nullptr);
    return y;
  }
  std::vector<float> ForwardGated(int threads, const Activations& x, int quantised_rows, Gate gate) {
    ThreadPool pool(threads);
    std::vector<float> y(static_cast<size_t>(x.rows) * out() / 2);
    std::vector<uint16_t> y16(y.size());
    const bool bf16 = x.precision == Precision::kBf16;
    const Activations target{bf16 ? static_cast<void*>(y16.data()) : y.data(), x.precision, x.rows, out() / 2};
    linear_.ForwardGated(pool, scratch_, x, quantised_rows, gate, target);
    for (size_t i = 0; bf16 && i < y.size(); ++i) y[i] = F32FromBf16(y16[i]);
    return y;
  }
  Dot Reference(const float* x, int output) const {
    Dot dot;
    for (int i = 0; i < in_; ++i) dot.Add(x[i], w_[static_cast<size_t>(output) * in_ + i]);
    dot.Add(b_[output], 1);
    return dot;
  }
  const float* weights(int output) const { return w_.data() + static_cast<size_t>(output) * in_; }

 private:
  int in_;
  LinearOptions options_;
  std::vector<std::unique_ptr<Weight>> weights_;
  std::vector<std::unique_ptr<Weight>> biases_;
  std::vector<float> w_;  // (out, in)
  std::vector<float> b_;  // (out)
  Linear linear_;
  LinearScratch scratch_;
};

// Rows of activations, exactly representable in `precision`.
struct Rows {
  Rows(Precision precision, int rows, int cols, uint64_t seed = 5)
      : values(RandomFloats(static_cast<size_t>(rows) * cols, seed)) {
    if (precision == Precision::kBf16) {
      RoundToBf16(values);
      values16 = ToBf16(values);
    }
    view = {precision == Precision::kBf16 ? static_cast<void*>(values16.data()) : values.data(), precision, rows, cols};
  }
  Activations Slice(int first, int rows) const {
    Activations slice = view;
    slice.data = view.precision == Precision::kBf16 ? static_cast<void*>(view.bf16(first)) : view.f32(first);
    slice.rows = rows;
    return slice;
  }
  const float* row(int r) const { return values.data() + static_cast<ptrdiff_t>(r) * view.cols; }

  std::vector<float> values;
  std::vector<uint16_t> values16;
  Activations view;
};

std::vector<Precision> Precisions(bool integers = false) {
  std::vector<Precision> precisions = {Precision::kF32};
  if (HasAvx512Bf16()) precisions.push_back(Precision::kBf16);
  if (integers && HasInt8Products()) precisions.push_back(Precision::kInt8);
  return precisions;
}

// Mixed types, odd tails, a bias on some.
const std::vector<Part> kMixed = {{GGML_TYPE_Q4_1, 70, true}, {GGML_TYPE_F16, 33, false}, {GGML_TYPE_Q6_K, 32, true}};
const std::vector<Part> kQuantised = {{GGML_TYPE_Q4_1, 70, true}, {GGML_TYPE_Q8_0, 33}, {GGML_TYPE_Q6_K, 32, true}};

TEST(LinearTest, PackedIsTheProduct) {
  for (const Precision precision : Precisions()) {
    Model model(kMixed, {precision, WeightsMemory::kPacked});
    for (int rows = 1; rows <= 30; ++rows) {
      const Rows x(precision, rows, kIn, rows);
      const std::vector<float> y = model.Forward(2, x.view, 0);
      const std::vector<float> before = RandomFloats(y.size(), 3);
      const std::vector<float> added = model.Forward(2, x.view, 0, &before);
      for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < model.out(); ++o) {
          Dot dot = model.Reference(x.row(r), o);
          const size_t at = static_cast<size_t>(r) * model.out() + o;
          ASSERT_NEAR(y[at], dot.value, dot.Tolerance()) << "row " << r << " output " << o;
          dot.Add(before[at], 1);
          ASSERT_NEAR(added[at], dot.value, dot.Tolerance()) << "row " << r << " output " << o;
        }
      }
    }
  }
}

void CheckRowsAreIndependent(Precision precision) {
  const int rows = 500;  // more than two row blocks
  const std::vector<Part>& parts = precision == Precision::kInt8 ? kQuantised : kMixed;
  Model packed(parts, {precision, WeightsMemory::kPacked});
  Model lean(parts, {precision, WeightsMemory::kLean});
  EXPECT_EQ(packed.linear().precision(), precision);
  EXPECT_GT(packed.linear().packed_bytes(), size_t{0});
  EXPECT_EQ(lean.linear().packed_bytes(), size_t{0});
  const Rows x(ActivationPrecision(precision), rows, kIn);
  const std::vector<float> all = packed.Forward(1, x.view, 0);
  for (int r = 0; r < rows && precision != Precision::kInt8; r += 71) {
    for (int o = 0; o < packed.out(); ++o) {
      const Dot dot = packed.Reference(x.row(r), o);
      ASSERT_NEAR(all[static_cast<size_t>(r) * packed.out() + o], dot.value, dot.Tolerance());
    }
  }
  for (const int threads : {1, 2, 3}) {
    EXPECT_EQ(packed.Forward(threads, x.view, 0), all);
    EXPECT_EQ(lean.Forward(threads, x.view, 0), all);
    for (const auto& [first, n] :
         std::vector<std::pair<int, int>>{{0, 1}, {499, 1}, {191, 2}, {100, 12}, {7, 13}, {3, 193}, {1, 384}}) {
      const std::vector<float> some = packed.Forward(threads, x.Slice(first, n), 0);
      EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin() + static_cast<ptrdiff_t>(first) * packed.out()))
          << first << " " << n;
      EXPECT_EQ(lean.Forward(threads, x.Slice(first, n), 0), some);
    }
  }
}

TEST(LinearTest, ARowIsTheSameInAnyBatchOnAnyThreadsPackedOrLean) {
  for (const Precision precision : Precisions()) CheckRowsAreIndependent(precision);
  ForEachInt8Kernel([] { CheckRowsAreIndependent(Precision::kInt8); });
}

// What ggml rounds of an activation before it multiplies: half a step of its block's grid for the 8-bit types, plus the
// scale's own rounding to f16 (2^-11 relative).
double ActivationStep(ggml_type type, const float* x, int i) {
  const int block = type == GGML_TYPE_Q8_K ? 256 : 32;
  float largest = 0;
  for (int j = i / block * block; j < i / block * block + block; ++j) largest = std::max(largest, std::abs(x[j]));
  switch (type) {
    case GGML_TYPE_F32: return 0;
    case GGML_TYPE_F16: return std::abs(x[i]) * 0x1p-10;
    case GGML_TYPE_BF16: return std::abs(x[i]) * 0x1p-7;
    default: return largest / 127;
  }
}

ggml_type ActivationType(ggml_type type) {
  switch (type) {
    case GGML_TYPE_F32:
    case GGML_TYPE_F16:
    case GGML_TYPE_BF16: return type;
    case GGML_TYPE_Q4_1:
    case GGML_TYPE_Q5_1: return GGML_TYPE_Q8_1;
    case GGML_TYPE_Q2_K:
    case GGML_TYPE_Q3_K:
    case GGML_TYPE_Q4_K:
    case GGML_TYPE_Q5_K:
    case GGML_TYPE_Q6_K:
    case GGML_TYPE_IQ4_XS: return GGML_TYPE_Q8_K;
    default: return GGML_TYPE_Q8_0;
  }
}

// No product may be off by more than half a step of every activation, and all of them together by no more than rounding
// noise of variance step^2 / 12 for each activation explains. `slack`: scales kept in f16, sums of 32 kept in f16.
TEST(LinearTest, QuantisedIsTheProductUpToTheActivationStep) {
  for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                               GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K,
                               GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS}) {
    Model model({{type, 75, true}, {type, 40, false}}, {Precision::kF32, WeightsMemory::kPacked});
    ASSERT_TRUE(model.linear().has_quantised()) << ggml_type_name(type);
    const Rows x(Precision::kF32, 9, kIn);
    const std::vector<float> y = model.Forward(2, x.view, 9);
    double squared_error = 0;
    double variance = 0;
    for (int r = 0; r < 9; ++r) {
      for (int o = 0; o < model.out(); ++o) {
        const Dot dot = model.Reference(x.row(r), o);
        const float* w = model.weights(o);
        double worst = 0;
        for (int i = 0; i < kIn; ++i) {
          const double step = ActivationStep(ActivationType(type), x.row(r), i);
          worst += std::abs(w[i]) * step / 2;
          variance += w[i] * w[i] * step * step / 12;
        }
        const double slack = type == GGML_TYPE_F32 ? 0 : dot.magnitude * 0x1p-9;
        const double error = y[static_cast<size_t>(r) * model.out() + o] - dot.value;
        ASSERT_LE(std::abs(error), worst + slack + dot.Tolerance())
            << ggml_type_name(type) << " row " << r << " output " << o;
        squared_error += error * error;
        variance += std::pow(dot.Tolerance(), 2);
      }
    }
    EXPECT_LE(squared_error, 1.5 * variance) << ggml_type_name(type);
  }
}

// Every type that ggml can make values of is taken, in each way that there is.
TEST(LinearTest, EveryTypeOfGgmls) {
  int types = 0;
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const auto type = static_cast<ggml_type>(t);
    if (ggml_get_type_traits(type)->to_float == nullptr || type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K) continue;
    SCOPED_TRACE(ggml_type_name(type));
    ++types;
    const Rows x(Precision::kF32, 3, kIn);
    for (const WeightsMemory memory : {WeightsMemory::kPacked, WeightsMemory::kLean}) {
      Model model({{type, 40, true}}, {Precision::kF32, memory});
      const std::vector<float> packed = model.Forward(2, x.view, 0);
      const std::vector<float> quantised = model.Forward(2, x.view, 3);
      double error = 0;
      double size = 0;
      for (int r = 0; r < 3; ++r) {
        for (int o = 0; o < model.out(); ++o) {
          const size_t at = static_cast<size_t>(r) * model.out() + o;
          const Dot dot = model.Reference(x.row(r), o);
          ASSERT_NEAR(packed[at], dot.value, dot.Tolerance());
          error += std::pow(quantised[at] - dot.value, 2);
          size += std::pow(dot.value, 2);
        }
      }
      EXPECT_GT(size, 0);
      // Activations of 8 bits in blocks of up to 256: steps of 1 / 127 of their largest value, which is about 3.
      EXPECT_LE(error, size * 1e-4);
    }
  }
  EXPECT_GE(types, 20);
}

// As above for packed integers: scales are f32 and groups 32 whatever the type. Weights off their file's grid, and
// offsets and steps in fewer bits, add to it.
TEST(LinearTest, Int8IsTheProductUpToTheActivationStep) {
  if (!HasInt8Products()) GTEST_SKIP() << "no 8-bit products";
  ForEachInt8Kernel([] {
    for (const ggml_type type :
         {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_Q2_K,
          GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS}) {
      Model model({{type, 75, true}, {type, 40, false}}, {Precision::kInt8, WeightsMemory::kPacked});
      ASSERT_EQ(model.linear().precision(), Precision::kInt8) << ggml_type_name(type);
      const Rows x(Precision::kF32, 9, kIn);
      const std::vector<float> y = model.Forward(2, x.view, 0);
      const std::vector<float> before = RandomFloats(y.size(), 3);
      const std::vector<float> added = model.Forward(2, x.view, 0, &before);
      double squared_error = 0;
      double variance = 0;
      for (int r = 0; r < 9; ++r) {
        for (int o = 0; o < model.out(); ++o) {
          const Dot dot = model.Reference(x.row(r), o);
          const float* w = model.weights(o);
          double worst = 0;
          for (int i = 0; i < kIn; ++i) {
            const double x_step = ActivationStep(GGML_TYPE_Q8_0, x.row(r), i);
            const double w_step = ActivationStep(GGML_TYPE_Q8_0, w, i);  // of 8 bits, as fitted
            worst += std::abs(w[i]) * x_step / 2 + (std::abs(x.row(r)[i]) + x_step / 2) * w_step / 2;
            variance += (w[i] * w[i] * x_step * x_step + x.row(r)[i] * x.row(r)[i] * w_step * w_step) / 12;
          }
          const size_t at = static_cast<size_t>(r) * model.out() + o;
          const double error = y[at] - dot.value;
          ASSERT_LE(std::abs(error), worst + dot.Tolerance())
              << ggml_type_name(type) << " row " << r << " output " << o;
          ASSERT_NEAR(added[at], before[at] + y[at], kF32Unit * std::abs(before[at] + y[at]));
          squared_error += error * error;
        }
      }
      EXPECT_LE(squared_error, 1.5 * variance) << ggml_type_name(type);
    }
  });
}

TEST(LinearTest, Int8OfWeightsThatAreNotQuantisedIsTheNativePrecision) {
  if (!HasInt8Products()) GTEST_SKIP() << "no 8-bit products";
  Model model(kMixed, {Precision::kInt8, WeightsMemory::kPacked});
  Model native(kMixed, {NativePrecision(), WeightsMemory::kPacked});
  EXPECT_EQ(model.linear().precision(), NativePrecision());
  const Rows x(NativePrecision(), 30, kIn);
  const Activations in_f32 = {const_cast<float*>(x.row(0)), Precision::kF32, 30, kIn};
  EXPECT_EQ(model.Forward(2, in_f32, 0), native.Forward(2, x.view, 0));
}

TEST(LinearTest, Int8NeedsTheCpu) {
  if (HasInt8Products()) GTEST_SKIP() << "has 8-bit products";
  const Weight weight(GGML_TYPE_Q4_0, 32, 5, 1);
  const gguf::Tensor* parts[] = {&weight.tensor};
  ThreadPool pool(1);
  const Expected<Linear> linear = Linear::Create(parts, {}, {Precision::kInt8, WeightsMemory::kPacked}, pool);
  ASSERT_FALSE(linear.ok());
  EXPECT_EQ(linear.status().code(), StatusCode::kUnsupported);
}

TEST(LinearTest, PanelBytesAddUp) {
  for (const Precision precision : Precisions(true)) {
    Model model(kMixed, {precision, WeightsMemory::kPacked});
    Model quantised(kQuantised, {precision, WeightsMemory::kPacked});
    EXPECT_EQ(quantised.linear().packed_bytes(), 3 * PanelBytes(precision, GGML_TYPE_Q4_1, kIn) +
                                                     2 * PanelBytes(precision, GGML_TYPE_Q8_0, kIn) +
                                                     PanelBytes(precision, GGML_TYPE_Q6_K, kIn));
    EXPECT_EQ(model.linear().packed_bytes(), 6 * PanelBytes(precision, GGML_TYPE_F16, kIn));
  }
}

TEST(LinearTest, QuantisedRowsAreIndependent) {
  Model model(kMixed, {Precision::kF32, WeightsMemory::kPacked});
  const Rows x(Precision::kF32, 20, kIn);
  const std::vector<float> all = model.Forward(1, x.view, 20);
  EXPECT_NE(all, model.Forward(1, x.view, 19)) << "more rows than that go the packed way";
  const std::vector<float> before = RandomFloats(all.size(), 3);
  const std::vector<float> added = model.Forward(2, x.view, 20, &before);
  for (size_t i = 0; i < all.size(); ++i) ASSERT_EQ(added[i], before[i] + all[i]);
  for (const int threads : {1, 2, 3}) {
    EXPECT_EQ(model.Forward(threads, x.view, 20), all);
    for (int first = 0; first < 20; ++first) {
      const std::vector<float> one = model.Forward(threads, x.Slice(first, 1), 1);
      EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + static_cast<ptrdiff_t>(first) * model.out()));
    }
  }
}

// All four parts want another type of activations, more than one f32 copy's bytes.
TEST(LinearTest, QuantisedPartsOfManyTypes) {
  const std::vector<Part> parts = {
      {GGML_TYPE_F16, 20}, {GGML_TYPE_BF16, 20}, {GGML_TYPE_Q4_1, 20}, {GGML_TYPE_Q4_K, 20}};
  Model model(parts, {Precision::kF32, WeightsMemory::kPacked});
  const Rows x(Precision::kF32, 64, kIn);
  const std::vector<float> y = model.Forward(2, x.view, 64);
  for (int r = 0; r < 64; ++r) {
    for (int o = 0; o < model.out(); ++o) {
      const Dot dot = model.Reference(x.row(r), o);
      ASSERT_NEAR(y[static_cast<size_t>(r) * model.out() + o], dot.value, dot.magnitude * 0.02)
          << "row " << r << " output " << o;
    }
  }
}

double Activation(Gate gate, double g) {
  return g / (1 + std::exp(gate == Gate::kSilu ? -g : -2 * std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
}

// Both activations have slopes below 1.13, so an error of g reaches the result times 1.13 |u|, one of u times |act(g)|.
TEST(LinearTest, Gated) {
  const int in = 64;
  for (const Precision precision : Precisions()) {
    for (const bool bias : {false, true}) {
      Model packed({{GGML_TYPE_F32, 45, bias}, {GGML_TYPE_F32, 45, bias}}, {precision, WeightsMemory::kPacked}, in);
      Model lean({{GGML_TYPE_F32, 45, bias}, {GGML_TYPE_F32, 45, bias}}, {precision, WeightsMemory::kLean}, in);
      for (const int rows : {1, 2, 11, 12, 13, 30, 192, 193, 400}) {
        const Rows x(precision, rows, in);
        for (const Gate gate : {Gate::kSilu, Gate::kGelu}) {
          const std::vector<float> y = packed.ForwardGated(2, x.view, 0, gate);
          for (int r = 0; r < rows; ++r) {
            for (int o = 0; o < 45; ++o) {
              const Dot g = packed.Reference(x.row(r), o);
              const Dot u = packed.Reference(x.row(r), 45 + o);
              const double act = Activation(gate, g.value);
              const double expected = act * u.value;
              const double unit = precision == Precision::kBf16 ? kBf16Unit : kF32Unit;
              // The exponent is formed in float: 2 |g| units and more for the cubic one.
              const double exponent = 16 + (gate == Gate::kGelu ? 4 * std::abs(std::pow(g.value, 3)) : 0);
              const double tolerance = 1.13 * g.Tolerance() * std::abs(u.value) + std::abs(act) * u.Tolerance() +
                                       std::abs(expected) * (unit + exponent * kF32Unit) + 1e-9;
              ASSERT_NEAR(y[static_cast<size_t>(r) * 45 + o], expected, tolerance) << "row " << r << " output " << o;
            }
          }
          for (const int threads : {1, 3}) EXPECT_EQ(packed.ForwardGated(threads, x.view, 0, gate), y);
          for (const int threads : {1, 2, 3}) EXPECT_EQ(lean.ForwardGated(threads, x.view, 0, gate), y);
          const std::vector<float> last = packed.ForwardGated(1, x.Slice(rows - 1, 1), 0, gate);
          EXPECT_TRUE(std::equal(last.begin(), last.end(), y.end() - 45));
        }
      }
    }
  }
}

TEST(LinearTest, GatedInt8IsTheGateOfTheProduct) {
  if (!HasInt8Products()) GTEST_SKIP() << "no 8-bit products";
  ForEachInt8Kernel([] {
    const std::vector<Part> parts = {{GGML_TYPE_Q4_1, 96, true}, {GGML_TYPE_Q8_0, 96, false}};
    Model packed(parts, {Precision::kInt8, WeightsMemory::kPacked});
    Model lean(parts, {Precision::kInt8, WeightsMemory::kLean});
    for (const int rows : {1, 5, 64, 193, 400}) {
      const Rows x(Precision::kF32, rows, kIn);
      const std::vector<float> both = packed.Forward(1, x.view, 0);
      for (const Gate gate : {Gate::kSilu, Gate::kGelu}) {
        std::vector<float> expected(static_cast<size_t>(rows) * 96);
        GatedProduct(gate, both.data(), both.data() + 96, 192, rows, 96, {expected.data(), Precision::kF32, rows, 96},
                     0, 0);
        for (const int threads : {1, 2, 3}) {
          EXPECT_EQ(packed.ForwardGated(threads, x.view, 0, gate), expected);
          EXPECT_EQ(lean.ForwardGated(threads, x.view, 0, gate), expected);
        }
      }
    }
  });
}

TEST(LinearTest, GatedQuantisedIsTheGateOfTheQuantisedProduct) {
  Model model({{GGML_TYPE_Q4_1, 600, true}, {GGML_TYPE_Q4_0, 600, false}}, {Precision::kF32, WeightsMemory::kPacked});
  const Rows x(Precision::kF32, 5, kIn);
  const std::vector<float> both = model.Forward(1, x.view, 5);
  for (const Gate gate : {Gate::kSilu, Gate::kGelu}) {
    std::vector<float> expected(static_cast<size_t>(5) * 600);
    GatedProduct(gate, both.data(), both.data() + 600, 1200, 5, 600, {expected.data(), Precision::kF32, 5, 600}, 0, 0);
    for (const int threads : {1, 2, 3}) {
      const std::vector<float> y = model.ForwardGated(threads, x.view, 5, gate);
      // Vector and scalar tails of the activation may differ in the last places.
      for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], expected[i], 1e-5 * std::abs(expected[i]) + 1e-30);
    }
  }
}

TEST(LinearTest, OddInnerSizes) {
  const Weight odd(GGML_TYPE_F32, 33, 5, 1);
  const gguf::Tensor* parts[] = {&odd.tensor};
  ThreadPool pool(1);
  const Expected<Linear> bf16 = Linear::Create(parts, {}, {Precision::kBf16, WeightsMemory::kPacked}, pool);
  ASSERT_FALSE(bf16.ok());
  EXPECT_EQ(bf16.status().code(), StatusCode::kUnsupported);
  EXPECT_NE(bf16.status().message().find("'w.f32'"), std::string::npos);
  EXPECT_TRUE(Linear::Create(parts, {}, {Precision::kF32, WeightsMemory::kPacked}, pool).ok());
}

}  // namespace
}  // namespace jointkv::dense
