// What the persistent decoder is made of: values that say by themselves whether they have arrived, and wgmma.
//
// Blocks hand results to each other through L2 without barriers. A word of a half-precision activation is ready once it
// is not kEmpty, a pattern no conversion yields (NaN is made 0x7fff). A word of a partial sum carries in its lowest bit
// the parity of the layer it belongs to. Either way one round trip tells both that a value is there and what it is.
#pragma once
#include "common.cuh"

constexpr uint32_t kEmpty = 0xffffffffu;
// Polls of about 0.5 us each before a wait is given up.
constexpr uint32_t kPatience = 1u << 22;

// Waits of one thread; once one has been given up, or another block has said so, none waits any more.
struct Watch {
    uint32_t* error;
    bool dead;
    __device__ __forceinline__ bool over(uint32_t spins) {
        if (dead) return true;
        if ((spins & 1023) == 1023) {
            uint32_t seen;
            asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(error) : "memory");
            if (seen == 0 && spins >= kPatience) {
                asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(error), "r"(1u) : "memory");
                seen = 1;
            }
            dead = seen != 0;
        }
        return dead;
    }
};

__device__ __forceinline__ uint4 fetch_16(const void* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ uint2 fetch_8(const void* p) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void publish(void* p, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void publish(void* p, uint2 v) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void publish(void* p, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A word is there when it is not kEmpty.
struct NotEmpty {
    template <int B>
    __device__ __forceinline__ bool operator()(const uint4 (&v)[B]) const {
        uint32_t top = 0;
#pragma unroll
        for (int j = 0; j < B; j++) top = max(max(max(top, v[j].x), max(v[j].y, v[j].z)), v[j].w);
        return top != kEmpty;
    }
};
// A word is there when its lowest bit is `parity`.
struct OfParity {
    uint32_t parity;
    template <int B>
    __device__ __forceinline__ bool operator()(const uint4 (&v)[B]) const {
        uint32_t off = 0;
#pragma unroll
        for (int j = 0; j < B; j++) off |= (v[j].x ^ parity) | (v[j].y ^ parity) | (v[j].z ^ parity) | (v[j].w ^ parity);
        return (off & 1) == 0;
    }
    __device__ __forceinline__ bool operator()(uint2 v) const { return (((v.x ^ parity) | (v.y ^ parity)) & 1) == 0; }
};
__device__ __forceinline__ uint32_t with_parity(uint32_t v, uint32_t parity) { return (v & ~1u) | parity; }
__device__ __forceinline__ uint32_t with_parity(float v, uint32_t parity) { return with_parity(__float_as_uint(v), parity); }

// Waits for 16 bytes at each at(j), by whole warps. One lane asks until its first piece is there: more of them would keep
// those who write from getting through.
template <int B, class At, class Ready>
__device__ __forceinline__ void await(uint4 (&v)[B], At at, Ready ready, Watch& watch) {
    if (threadIdx.x % 32 == 0)
        for (uint32_t spins = 0; !watch.over(spins); spins++) {
            uint4 first[1] = {fetch_16(at(0))};
            if (ready(first)) break;
        }
    __syncwarp();
    for (uint32_t spins = 0;; spins++) {
#pragma unroll
        for (int j = 0; j < B; j++) v[j] = fetch_16(at(j));
        if (ready(v) || watch.over(spins)) return;
        __nanosleep(40);
    }
}

__device__ __forceinline__ void barrier_init_n(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
// Threads of this block that share number `id` meet.
__device__ __forceinline__ void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// What ordinary stores wrote to shared memory is seen by wgmma after this and a barrier.
__device__ __forceinline__ void publish_to_mma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Transposes the 8x8 matrix of 16-bit values that a warp holds in fragment order.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
    return d;
}

// Operand of wgmma in shared memory without swizzle: 8 rows of 16 bytes lie together; `leading` and `stride` are the
// bytes from one such matrix to the next along K and along rows (for a transposed operand the other way round, with
// `leading` still along K).
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t leading, uint32_t stride) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32;
}
// A value that all lanes hold, known to the compiler as such: operands of wgmma are then computed once a warp.
__device__ __forceinline__ uint32_t of_warp(uint32_t v) { return __shfl_sync(0xffffffffu, v, 0); }
// The same operand so many bytes on.
__device__ __forceinline__ uint64_t along(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }
__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
// d (+)= a.b with a 64x16 and b 16x56, both K-major.
__device__ __forceinline__ void mma_64x56(float (&d)[28], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %30, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n56k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27}, "
        "%28, %29, p, 1, 1, 0, 0;\n}\n"
        : D4(0), D4(4), D4(8), D4(12), D4(16), D4(20), D4(24)
        : "l"(a), "l"(b), "r"(add));
}
// d (+)= a.b with a 64x16 (with rows along memory if TRANSPOSED) and b 16x32.
template <int TRANSPOSED>
__device__ __forceinline__ void mma_64x32(float (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, %19, 0;\n}\n"
        : D4(0), D4(4), D4(8), D4(12)
        : "l"(a), "l"(b), "r"(add), "n"(TRANSPOSED));
}
#undef D4
