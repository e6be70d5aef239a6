// Matrix instructions of sm_90a: operands in shared memory in the 128-byte swizzle, results in registers.
//
// A tile is rows of 64 bf16 (128 bytes) whose 16-byte pieces are exchanged by row number modulo 8; wider rows are
// several such tiles one behind the other. Every tile begins at a multiple of 1024 bytes.
#pragma once
#include "common.cuh"

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

// Operand lists of a matrix instruction with so many floats a thread.
#define WGMMA_FLOATS_20 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define WGMMA_FLOATS_24 WGMMA_FLOATS_20 ", %20, %21, %22, %23"
#define WGMMA_FLOATS_28 WGMMA_FLOATS_24 ", %24, %25, %26, %27"
#define WGMMA_FLOATS_32 WGMMA_FLOATS_28 ", %28, %29, %30, %31"
#define WGMMA_FLOATS_36 WGMMA_FLOATS_32 ", %32, %33, %34, %35"
#define WGMMA_FLOATS_40 WGMMA_FLOATS_36 ", %36, %37, %38, %39"
#define WGMMA_FLOATS_44 WGMMA_FLOATS_40 ", %40, %41, %42, %43"
#define WGMMA_FLOATS_48 WGMMA_FLOATS_44 ", %44, %45, %46, %47"
#define WGMMA_FLOATS_52 WGMMA_FLOATS_48 ", %48, %49, %50, %51"
#define WGMMA_FLOATS_56 WGMMA_FLOATS_52 ", %52, %53, %54, %55"
#define WGMMA_FLOATS_60 WGMMA_FLOATS_56 ", %56, %57, %58, %59"
#define WGMMA_FLOATS_64 WGMMA_FLOATS_60 ", %60, %61, %62, %63"
#define WGMMA_FLOATS_68 WGMMA_FLOATS_64 ", %64, %65, %66, %67"
#define WGMMA_FLOATS_72 WGMMA_FLOATS_68 ", %68, %69, %70, %71"
#define WGMMA_FLOATS_76 WGMMA_FLOATS_72 ", %72, %73, %74, %75"
#define WGMMA_FLOATS_80 WGMMA_FLOATS_76 ", %76, %77, %78, %79"
#define WGMMA_FLOATS_84 WGMMA_FLOATS_80 ", %80, %81, %82, %83"
#define WGMMA_FLOATS_88 WGMMA_FLOATS_84 ", %84, %85, %86, %87"
#define WGMMA_FLOATS_92 WGMMA_FLOATS_88 ", %88, %89, %90, %91"
#define WGMMA_FLOATS_96 WGMMA_FLOATS_92 ", %92, %93, %94, %95"
#define WGMMA_FLOATS_100 WGMMA_FLOATS_96 ", %96, %97, %98, %99"
#define WGMMA_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_OUTS_20 WGMMA_OUT_4(0), WGMMA_OUT_4(4), WGMMA_OUT_4(8), WGMMA_OUT_4(12), WGMMA_OUT_4(16)
#define WGMMA_OUTS_24 WGMMA_OUTS_20, WGMMA_OUT_4(20)
#define WGMMA_OUTS_28 WGMMA_OUTS_24, WGMMA_OUT_4(24)
#define WGMMA_OUTS_32 WGMMA_OUTS_28, WGMMA_OUT_4(28)
#define WGMMA_OUTS_36 WGMMA_OUTS_32, WGMMA_OUT_4(32)
#define WGMMA_OUTS_40 WGMMA_OUTS_36, WGMMA_OUT_4(36)
#define WGMMA_OUTS_44 WGMMA_OUTS_40, WGMMA_OUT_4(40)
#define WGMMA_OUTS_48 WGMMA_OUTS_44, WGMMA_OUT_4(44)
#define WGMMA_OUTS_52 WGMMA_OUTS_48, WGMMA_OUT_4(48)
#define WGMMA_OUTS_56 WGMMA_OUTS_52, WGMMA_OUT_4(52)
#define WGMMA_OUTS_60 WGMMA_OUTS_56, WGMMA_OUT_4(56)
#define WGMMA_OUTS_64 WGMMA_OUTS_60, WGMMA_OUT_4(60)
#define WGMMA_OUTS_68 WGMMA_OUTS_64, WGMMA_OUT_4(64)
#define WGMMA_OUTS_72 WGMMA_OUTS_68, WGMMA_OUT_4(68)
#define WGMMA_OUTS_76 WGMMA_OUTS_72, WGMMA_OUT_4(72)
#define WGMMA_OUTS_80 WGMMA_OUTS_76, WGMMA_OUT_4(76)
#define WGMMA_OUTS_84 WGMMA_OUTS_80, WGMMA_OUT_4(80)
#define WGMMA_OUTS_88 WGMMA_OUTS_84, WGMMA_OUT_4(84)
#define WGMMA_OUTS_92 WGMMA_OUTS_88, WGMMA_OUT_4(88)
#define WGMMA_OUTS_96 WGMMA_OUTS_92, WGMMA_OUT_4(92)
#define WGMMA_OUTS_100 WGMMA_OUTS_96, WGMMA_OUT_4(96)

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
