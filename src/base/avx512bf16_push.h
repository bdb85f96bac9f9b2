// Everything between this include and base/avx512bf16_pop.h is compiled for AVX-512 with BF16, whatever the rest of the
// program is built for. Callers must have asked HasAvx512Bf16() (base/cpu.h). No include guard: included in pairs.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic push
// GCC 12's own intrinsics start from variables that are undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif
