// Matrix instructions of sm_90a: operands in shared memory in the 128-byte swizzle, results in registers.
//
// A tile is rows of 64 bf16 (128 bytes) whose 16-byte pieces are exchanged by row number modulo 8; wider rows are
// several such tiles one behind the other. Every tile begins at a multiple of 1024 bytes.
#pragma once
#include "common.cuh"
#include "operands.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Byte offset of piece `c` (8 elements) of row `r` in tiles of `rows` rows.
__device__ __forceinline__ uint32_t swizzled(int rows, int r, int c) {
    return (c / 8) * rows * 128 + r * 128 + ((c ^ r) % 8) * 16;
}

// Describes a tile to the matrix unit. `stride`: bytes between groups of 8 rows. `lead`: bytes between tiles that lie
// side by side along M or N, where those are the contiguous dimension; of no meaning where K is.
__device__ __forceinline__ uint64_t tile_descriptor(const void* shared, uint32_t lead, uint32_t stride) {
    return static_cast<uint64_t>((smem_address(shared) & 0x3ffff) >> 4) | static_cast<uint64_t>(lead >> 4) << 16 |
           static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

// Stores two 8×8 matrices with rows and columns exchanged; lanes 0 to 15 name the rows.
__device__ __forceinline__ void store_transposed(void* shared, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem_address(shared)), "r"(a),
                 "r"(b)
                 : "memory");
}

// What other threads wrote to shared memory becomes visible to the matrix unit; a barrier follows.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers that a matrix instruction reads or adds to may have been written before this.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// A descriptor whose lower half has been moved on: addresses of shared memory do not carry into the upper one.
__device__ __forceinline__ uint64_t with_upper(uint32_t lower, uint64_t descriptor) {
    return (descriptor >> 32 << 32) | lower;
}

// As barrier_init of common.cuh, for `count` arrivals.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// Waits until `threads` have come here; `pass` only says that these have.
__device__ __forceinline__ void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void pass(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A slot of the ring and the parity of its barriers.
template <int kStages>
struct Slot {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++index == kStages) index = 0, parity ^= 1;
    }
};

// NAME: d = a·bᵀ (+ d), a 64×16 and b N×16 in shared memory. K is contiguous in b, and in a too unless ROWS is 1: then
// M is. A, B, ADD: the operand numbers behind the floats.
#define WGMMA(NAME, N, FLOATS, A, B, ADD, ROWS)                                                             \
    __device__ __forceinline__ void NAME(float (&d)[FLOATS], uint64_t a, uint64_t b, int add) {             \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n"                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_FLOATS_##FLOATS "}, " \
                     "%" #A ", %" #B ", p, 1, 1, " #ROWS ", 0; }"                                           \
                     : WGMMA_OUTS_##FLOATS                                                                  \
                     : "l"(a), "l"(b), "r"(add));                                                           \
    }

WGMMA(wgmma_64x128, 128, 64, 64, 65, 66, 0)

// d = a·b (+ d): a 64×16 in registers, b 16×80 with N contiguous.
__device__ __forceinline__ void wgmma_64x80(float (&d)[40], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                                            int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %45, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" WGMMA_FLOATS_40 "}, {%40, %41, %42, %43}, %44, p, 1, 1, 1; }"
        : WGMMA_OUTS_40
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));
}

#endif
