// What this machine can do at best with so many threads: the yardsticks of a benchmark.
#pragma once

namespace jointkv::cli {

double ReadBandwidthGbS(int threads);
// Of bf16 dot products in registers; 0 where the CPU has none.
double Bf16PeakGflopS(int threads);
// Of f32 multiply-adds in registers; 0 on a CPU without AVX2.
double F32PeakGflopS(int threads);

}  // namespace jointkv::cli
