// f32 to bf16 with round to nearest even on any Highway target (Highway 1.0's own demotion truncates). Per-target
// include guard, as Highway asks.
#if defined(JOINTKV_DENSE_BF16_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef JOINTKV_DENSE_BF16_INL_H_
#undef JOINTKV_DENSE_BF16_INL_H_
#else
#define JOINTKV_DENSE_BF16_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace jointkv::dense::HWY_NAMESPACE {

// One vector of floats to as many bf16. NaN is not preserved: activations are finite.
template <class D>
HWY_INLINE void StoreBf16(D /*d*/, hwy::HWY_NAMESPACE::Vec<D> value, uint16_t* out) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> d16;
  const auto bits = hn::BitCast(du, value);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff))));
  hn::StoreU(hn::TruncateTo(d16, rounded), d16, out);
}

}  // namespace jointkv::dense::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard
