// kernels/common.cuh for a CPU: what the portable kernels use of a GPU, lane by lane.
//
// Every CUDA thread is a fibre; what a warp does together waits for its 32 lanes, and fails where not all of them come.
// Asynchronous copies arrive when they are waited for and not before. Shared memory has the size the launch asked for;
// accesses outside of it, and unaligned ones, end the program.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __trap() std::abort()

using std::max;
using std::min;

struct bf16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __bfloat162float(bf16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline bf16 __float2bfloat16(float f) {
    if (f != f) return {0x7fff};
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    exit(2);
}
inline float __half2float(__half) { fail("half precision is not emulated"); }

struct Index {
    int x, y, z;
};

// One CUDA thread.
struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    Index thread;
    bool done;
    std::vector<std::function<void()>> open;                // copies since the last commit
    std::deque<std::vector<std::function<void()>>> groups;  // committed, not waited for
};

inline Fibre* current;
inline Index blockIdx, gridDim, blockDim;
#define threadIdx (current->thread)

// What every chip from sm_80 on gives a block.
constexpr size_t kMostShared = 99 * 1024;
alignas(128) inline uint8_t arena[kMostShared];
inline size_t arena_bytes;

inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline int running, at_barrier, barriers;
struct Warp {
    int running = 32, waiting = 0, round = 0;
    uint32_t words[32][6];
};
inline std::vector<Warp> warps;

inline void let_others_run() { swapcontext(&current->context, &scheduler); }

inline void pass_barrier() { at_barrier = 0, barriers++; }

inline void __syncthreads() {
    const int now = barriers;
    if (++at_barrier == running) return pass_barrier();
    while (barriers == now) let_others_run();
}

inline void meet(Warp& w) {
    if (w.running != 32) fail("a warp acts together, and some of its lanes have returned");
    const int now = w.round;
    if (++w.waiting == 32) {
        w.waiting = 0, w.round++;
        return;
    }
    while (w.round == now) let_others_run();
}

// What every lane of the warp hands in.
inline Warp exchange(std::initializer_list<uint32_t> words) {
    Warp& w = warps[threadIdx.x / 32];
    std::copy(words.begin(), words.end(), w.words[threadIdx.x % 32]);
    meet(w);
    const Warp all = w;
    meet(w);
    return all;
}

inline void run_fibre();
inline std::function<void()> kernel;

// Blocks one after the other, the threads of a block in turns. Shared memory starts as NaN.
inline void launch(Index grid, int threads, size_t shared, std::function<void()> body) {
    if (shared > kMostShared) fail("more shared memory than every chip has");
    kernel = body, gridDim = grid, blockDim = {threads, 1, 1}, arena_bytes = shared;
    if (fibres.size() < static_cast<size_t>(threads)) fibres.resize(threads);
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y++)
            for (int x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                running = threads, at_barrier = 0;
                warps.assign(threads / 32, Warp{});
                memset(arena, 0xff, sizeof arena);
                for (int i = 0; i < threads; i++) {
                    Fibre& f = fibres[i];
                    f.stack.resize(128 << 10);
                    f.thread = {i, 0, 0}, f.done = false;
                    f.open.clear(), f.groups.clear();
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
                    makecontext(&f.context, run_fibre, 0);
                }
                while (running)
                    for (int i = 0; i < threads; i++)
                        if (!fibres[i].done) {
                            current = &fibres[i];
                            swapcontext(&scheduler, &current->context);
                        }
            }
}

inline void run_fibre() {
    kernel();
    current->done = true;
    warps[threadIdx.x / 32].running--;
    running--;
    if (running && at_barrier == running) pass_barrier();
    let_others_run();
}

inline void in_shared(const void* p) {
    const size_t at = static_cast<const uint8_t*>(p) - arena;
    if (at % 16 || at + 16 > arena_bytes) fail("a shared access is unaligned or outside");
}

inline void grid_wait() {}
inline void grid_launch_dependents() {}
inline void prefetch_l2_line(const void*) {}
inline uint4 load_once_16(const void* p) { return *static_cast<const uint4*>(p); }

inline void copy_async_16(void* shared, const void* global) {
    in_shared(shared);
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("an unaligned copy");
    current->open.push_back([=] { memcpy(shared, global, 16); });
}
inline void copy_async_commit() { current->groups.push_back(std::move(current->open)), current->open.clear(); }
template <int N>
inline void copy_async_wait() {
    for (; current->groups.size() > N; current->groups.pop_front())
        for (const auto& copy : current->groups.front()) copy();
}
inline void store_zero_16(void* shared) {
    in_shared(shared);
    memset(shared, 0, 16);
}

// Lane l gives row l % 8 of matrix l / 8 and gets two elements of each matrix (PTX ISA, ldmatrix).
inline void load_matrices(uint32_t (&r)[4], const void* p, bool transposed) {
    in_shared(p);
    const Warp all = exchange({static_cast<uint32_t>(static_cast<const uint8_t*>(p) - arena)});
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < 4; m++) {
        r[m] = 0;
        for (int i = 0; i < 2; i++) {
            const int along = 2 * (lane % 4) + i, row = transposed ? along : lane / 4, column = transposed ? lane / 4 : along;
            uint16_t element;
            memcpy(&element, arena + all.words[m * 8 + row][0] + column * 2, 2);
            r[m] |= static_cast<uint32_t>(element) << 16 * i;
        }
    }
    exchange({});  // nobody writes before all have read
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p) { load_matrices(r, p, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) { load_matrices(r, p, true); }

// mma.m16n8k16 with the fragments of the PTX ISA: lane 4·g + t holds rows g and g + 8 of a, column g of b.
inline void mma_16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const Warp all = exchange({a0, a1, a2, a3, b0, b1});
    const int lane = threadIdx.x % 32;
    auto half = [&](int line, int k, int word) {
        const uint32_t both = all.words[line * 4 + k % 8 / 2][word];
        return __bfloat162float({static_cast<uint16_t>(k % 2 ? both >> 16 : both)});
    };
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) d[i] += half(row % 8, k, row / 8 + k / 8 * 2) * half(column, k, 4 + k / 8);
    }
}

inline float __shfl_xor_sync(uint32_t, float v, int lanes) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const Warp all = exchange({bits});
    memcpy(&v, all.words[(threadIdx.x % 32) ^ lanes], 4);
    return v;
}
inline float warp_sum(float v) {
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float silu(float x) { return x / (1.0f + expf(-x)); }
inline float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }

inline uint32_t pack_bf16(float lo, float hi) {
    return __float2bfloat16(lo).bits | static_cast<uint32_t>(__float2bfloat16(hi).bits) << 16;
}
inline uint2 pack_bf16x4(float4 v) { return make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)); }
inline float2 unpack_bf16(uint32_t v) {
    return {__bfloat162float({static_cast<uint16_t>(v)}), __bfloat162float({static_cast<uint16_t>(v >> 16)})};
}
inline size_t panel(int row, int k, int stride) { return (static_cast<size_t>(k / 8) * stride + row) * 8 + k % 8; }

struct EncodeParams {
    bf16* keys;
    bf16* values;
    int64_t layer_stride;
};
struct DecodeParams {
    const bf16* keys;
    const bf16* values;
    int64_t layer_stride;
    int32_t prefix, guided;
};
