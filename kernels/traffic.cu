// What the other stage does to the memory, and to its share of the SMs, while products are timed.
#include "common.cuh"

constexpr int kThreads = 256;

struct TrafficArgs {
    const uint4* from;
    int64_t count;
    const volatile uint8_t* stop;
    volatile uint8_t* began;  // in host memory, one of each block
    int64_t most_ns;
    volatile uint8_t* never;
};

constexpr int kTrafficLoads = 4;

// Reads memory round and round until `stop` is set, or for `most_ns`. Each block wants so much shared memory that little of another
// kernel fits beside it.
extern "C" __global__ void __launch_bounds__(kThreads) traffic(const __grid_constant__ TrafficArgs a) {
    const auto now = [] {
        int64_t ns;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
        return ns;
    };
    const int64_t begun = now(), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    if (threadIdx.x == 0) a.began[blockIdx.x] = 1;
    int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    uint32_t sum = 0;
    bool done = false;
    while (!done) {
        for (int round = 0; round < 8; ++round) {
            uint4 v[kTrafficLoads];
#pragma unroll
            for (int n = 0; n < kTrafficLoads; ++n, i += stride) {
                if (i >= a.count) i -= a.count;
                v[n] = __ldcg(a.from + i);
            }
#pragma unroll
            for (int n = 0; n < kTrafficLoads; ++n) sum += v[n].x ^ v[n].y ^ v[n].z ^ v[n].w;
        }
        done = __syncthreads_or(threadIdx.x == 0 && (*a.stop != 0 || now() - begun > a.most_ns));
    }
    // So that the reads stay.
    if (sum == 0x9e3779b9u && a.most_ns < 0) *a.never = 1;
}
