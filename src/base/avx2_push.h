// Everything between this include and base/avx2_pop.h is compiled for AVX2 with FMA and F16C, whatever the rest of the
// program is built for. Callers must have asked HasAvx2() (base/cpu.h). No include guard: included in pairs.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
