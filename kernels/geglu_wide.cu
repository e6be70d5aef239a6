// Gate and up projections of the prefix trunk with their gated GELU on sm_90a: y = gelu_tanh(x·gateᵀ) ⊙ (x·upᵀ).
//
// Weights are the rows of the matrix instructions and tokens their columns, so that any number of tokens is cut into
// equal tiles almost without waste. A block multiplies 256 weight rows (128 hidden units) by N tokens: one warp fetches,
// two groups of four warps multiply 128 rows each and finish in registers. Units of work go over token tiles first, so
// weights come from memory once and from L2 after. The norm in front of the product is folded in as in tower.cu: x is
// the residual times the norm's weight, and three warps find what the sums are divided by.
//
// One tile sums K in order, so results do not depend on the number of blocks or on N. Where that leaves the last round of
// units nearly empty, the last weight rows are cut into shorter tiles of kShort tokens: the units of that round end sooner.
//
// Packed weights: [mlp/128][K/64][256 rows][64], rows in the 128-byte swizzle. Hidden unit 64·i + 16·w + 4·t + 2·b + e
// of a tile is row 128·i + 64·b + 16·w + 2·t + e, its up row lies 8 further: a thread then has the gate and the up of the
// same unit and token, and four threads have 16 units of a token, side by side.
// Packed activations: [K/64][octets][8 tokens][64], the same swizzle. What tokens past the last hold is of no meaning.
#include "wgmma.cuh"

constexpr int kGroup = 128;     // threads of one group
constexpr int kMeasuring = 96;  // threads that find norms

struct GegluWideArgs {
    const bf16* w;          // packed
    const bf16* x;          // packed
    const float2* moments;  // [width_tiles][tokens], as tower.cu leaves them
    bf16* y;                // [tokens, mlp]
    int32_t tokens, octets;    // octets: groups of 8 tokens from one K to the next, at least tokens/8
    int32_t token_tiles;       // tiles of N tokens
    int32_t short_tiles;       // or of fewer
    int32_t weight_tiles;      // mlp/128
    int32_t first_short;       // the weight tile from which on tiles are short
    int32_t k_blocks;          // K/64, at least the stages of the ring
    int32_t lead;              // K blocks that the first group is ahead of the second, fewer than the stages
    int32_t width_tiles;
    float inv_width, eps;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

WGMMA(wgmma, 72, 36, 36, 37, 38, 0)
WGMMA(wgmma, 96, 48, 48, 49, 50, 0)
WGMMA(wgmma, 112, 56, 56, 57, 58, 0)
WGMMA(wgmma, 128, 64, 64, 65, 66, 0)
WGMMA(wgmma, 144, 72, 72, 73, 74, 0)
WGMMA(wgmma, 160, 80, 80, 81, 82, 0)
WGMMA(wgmma, 176, 88, 88, 89, 90, 0)
WGMMA(wgmma, 184, 92, 92, 93, 94, 0)
WGMMA(wgmma, 192, 96, 96, 97, 98, 0)

// A store without a branch, so that the code around it is one piece to schedule.
__device__ __forceinline__ void store_if(bool wanted, void* global, uint32_t x, uint32_t y) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3}; }" ::"r"(static_cast<int>(wanted)),
                 "l"(global), "r"(x), "r"(y)
                 : "memory");
}

// Exchanges rows and columns of an 8×8 matrix of bf16 that a warp holds, row lane/4 and two columns a thread.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// gelu_tanh(gate)·up. As gelu_tanh, with its constants folded; the reciprocal of infinity is the 0 that is wanted.
__device__ __forceinline__ float gated(float gate, float up) {
    constexpr float kLinear = -2.0f * 1.4426950408889634f * 0.7978845608028654f, kCubic = kLinear * 0.044715f;
    float inv;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inv) : "f"(1.0f + exp2_fast(gate * fmaf(kCubic, gate * gate, kLinear))));
    return gate * inv * up;
}

// One block's part for tiles of kN and of kShort tokens.
template <int kN, int kShort>
struct Wide {
    static constexpr int kHalf = 128 * 128;  // bytes of the weights of one group
    static constexpr int kStage = 2 * kHalf + kN * 128;
    static constexpr int kStages = 224 * 1024 / kStage;
    static_assert(kN % 8 == 0 && kN > kShort && kStages >= 4, "tokens of a tile");

    const GegluWideArgs& a;
    uint8_t* ring;          // stages of weights, then activations
    float (*norms)[kN];     // of this unit of work and the next: 1/√(mean(x²) + eps) of each token
    uint64_t *full, *empty;
    int first, step, units, long_units;  // the first long_units have kN tokens

    __device__ __forceinline__ bool is_short(int unit) const { return unit >= long_units; }
    __device__ __forceinline__ int weight_tile(int unit) const {
        return is_short(unit) ? a.first_short + (unit - long_units) / a.short_tiles : unit / a.token_tiles;
    }
    __device__ __forceinline__ int token(int unit) const {
        return is_short(unit) ? (unit - long_units) % a.short_tiles * kShort : unit % a.token_tiles * kN;
    }

    // One thread keeps the ring filled. Weights do not wait for the kernel before this one.
    __device__ __forceinline__ void produce() const {
        const uint64_t policy = passing();
        Slot<kStages> slot;
        for (int unit = first; unit < units; unit += step) {
            const int octets = min((is_short(unit) ? kShort : kN) / 8, (a.tokens + 7 - token(unit)) / 8);
            const bf16* w = a.w + static_cast<size_t>(weight_tile(unit)) * a.k_blocks * (256 * 64);
            const bf16* x = a.x + token(unit) / 8 * 512;
            auto weights = [&](int s) {
                barrier_expect(&full[s], 2 * kHalf + octets * 1024);
                copy_bulk(ring + s * kStage, w, 2 * kHalf, &full[s], policy);
                w += 256 * 64;
            };
            int begun = 0;
            if (unit == first) {
                for (; begun < kStages; begun++) weights(begun);
                grid_wait();
            }
            for (int k = 0; k < a.k_blocks; k++, slot.next()) {
                if (k >= begun) {
                    barrier_wait(&empty[slot.index], slot.parity ^ 1);
                    weights(slot.index);
                }
                copy_bulk(ring + slot.index * kStage + 2 * kHalf, x, octets * 1024, &full[slot.index]);
                x += a.octets * 512;
            }
        }
        grid_wait();
    }

    // Barriers of the two halves of `norms` and each group: they are there; they have been read. One for each, for nobody
    // may come to a barrier twice before all have.
    static __device__ __forceinline__ int there(int half, int group) { return 2 + half * 2 + group; }
    static __device__ __forceinline__ int taken(int half, int group) { return 6 + half * 2 + group; }

    // Three warps stay up to two units ahead of each group.
    __device__ __forceinline__ void measure() const {
        constexpr int kBoth = kGroup + kMeasuring;
        grid_wait();
        int n = 0;
        for (int unit = first; unit < units; unit += step, n++) {
            if (n > 1) {
                meet(taken(n % 2, 0), kBoth);
                meet(taken(n % 2, 1), kBoth);
            }
            for (int i = threadIdx.x % kGroup - 32; i < kN; i += kMeasuring) {
                const float2* m = a.moments + min(token(unit) + i, a.tokens - 1);
                float squares = 0.0f;
#pragma unroll 4
                for (int j = 0; j < a.width_tiles; j++) squares += m[static_cast<size_t>(j) * a.tokens].y;
                norms[n % 2][i] = rsqrtf(squares * a.inv_width + a.eps);
            }
            __syncwarp();
            pass(there(n % 2, 0), kBoth);
            pass(there(n % 2, 1), kBoth);
        }
    }

    // GELU of a group's sums, and a transposition 8×8 by 8×8: a thread stores four hidden units of a token.
    template <int N>
    __device__ __forceinline__ void finish(const float (&d)[2][N / 2], const float* norms, int unit, int group) const {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        const int mlp = a.weight_tiles * 128, row = token(unit) + g;
        bf16* to = a.y + static_cast<size_t>(row) * mlp + weight_tile(unit) * 128 + group * 64 + warp * 16 + t * 4;
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            const float2 r = *reinterpret_cast<const float2*>(norms + 8 * i + 2 * t);
            uint32_t v[2];
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const float* s = &d[b][4 * i];
                v[b] = transpose_8x8(pack_bf16(gated(s[0] * r.x, s[2] * r.x), gated(s[1] * r.y, s[3] * r.y)));
            }
            store_if(row + i * 8 < a.tokens, to, v[0], v[1]);
            to += 8 * mlp;
        }
    }

    // A group's part of a tile of N tokens, the n-th unit of this block. `ahead` counts what the first group has yet to do
    // before the second may begin.
    template <int N>
    __device__ __forceinline__ void multiply(int unit, int n, int group, Slot<kStages>& slot, int& ahead) const {
        const int lane = threadIdx.x % 32;
        const uint64_t weights = tile_descriptor(ring, 16, 1024), tokens = tile_descriptor(ring + 2 * kHalf, 16, 1024);
        auto leave = [&](int slot) {
            if (lane == 0) barrier_arrive(&empty[slot]);
        };
        float d[2][N / 2];
        int before = 0;
        for (int k = 0; k < a.k_blocks; k++) {
            barrier_wait(&full[slot.index], slot.parity);
            wgmma_fence();
            const uint32_t at = slot.index * (kStage / 16);
            const uint32_t rows = static_cast<uint32_t>(weights) + at + group * (kHalf / 16);
            const uint32_t columns = static_cast<uint32_t>(tokens) + at;
#pragma unroll
            for (int kk = 0; kk < 4; kk++)
#pragma unroll
                for (int b = 0; b < 2; b++)
                    wgmma(d[b], with_upper(rows + b * (kHalf / 32) + kk * 2, weights),
                          with_upper(columns + kk * 2, tokens), kk || k);
            wgmma_commit();
            // The matrices of the block before have been read.
            wgmma_wait<1>();
            if (k) leave(before);
            if (group == 0 && --ahead == 0) asm volatile("bar.arrive 1, 256;" ::: "memory");
            before = slot.index;
            slot.next();
        }
        wgmma_wait<0>();
        leave(before);
        // No sum is looked at before this.
#pragma unroll
        for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(d[0][i]), "+f"(d[1][i])::"memory");
        meet(there(n % 2, group), kGroup + kMeasuring);
        finish<N>(d, norms[n % 2], unit, group);
        if (unit + 2 * step < units) pass(taken(n % 2, group), kGroup + kMeasuring);
    }
    // One group multiplies its rows of every tile and finishes them: this block's long tiles come first.
    __device__ __forceinline__ void consume(int group) const {
        grid_wait();
        // While one group is at its GELU the other multiplies: the first starts ahead and stays so.
        int ahead = a.lead;
        if (group == 1 && a.lead > 0 && first < units) asm volatile("bar.sync 1, 256;" ::: "memory");
        Slot<kStages> slot;
        int n = 0, unit = first;
        for (; unit < long_units; unit += step, n++) multiply<kN>(unit, n, group, slot, ahead);
        for (; unit < units; unit += step, n++) multiply<kShort>(unit, n, group, slot, ahead);
    }
};

#endif

template <int kN, int kShort>
__device__ __forceinline__ void geglu_wide(const GegluWideArgs& a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t raw[];
    using Block = Wide<kN, kShort>;
    constexpr int kStages = Block::kStages;
    __shared__ uint64_t barriers[2 * kStages];
    __shared__ __align__(8) float norms[2][kN];
    uint64_t *full = barriers, *empty = barriers + kStages;
    // The compiler shall see that this is the same for a warp: descriptors made of it stay in uniform registers.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroup, 0);
    grid_launch_dependents();
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; s++) {
            barrier_init(&full[s], 1);
            barrier_init(&empty[s], 8);  // the warps that multiply
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    uint8_t* ring = raw + (1024 - smem_address(raw) % 1024) % 1024;
    const Block wide{a, ring, norms, full, empty, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
                        a.first_short * a.token_tiles + (a.weight_tiles - a.first_short) * a.short_tiles, a.first_short * a.token_tiles};
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x >= 2 * kGroup + 32)
            wide.measure();
        else if (threadIdx.x == 2 * kGroup)
            wide.produce();
        else
            grid_wait();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wide.consume(group);
    }
#else
    __trap();
#endif
}

#define GEGLU_WIDE(N, SHORT)                                                         \
    extern "C" __global__ void __launch_bounds__(3 * kGroup, 1)                      \
        geglu_wide_##N##_##SHORT(const __grid_constant__ GegluWideArgs a) {          \
        geglu_wide<N, SHORT>(a);                                                     \
    }
GEGLU_WIDE(96, 72)
GEGLU_WIDE(128, 72)
GEGLU_WIDE(144, 72)
GEGLU_WIDE(160, 72)
GEGLU_WIDE(176, 72)
GEGLU_WIDE(184, 72)
GEGLU_WIDE(184, 112)
GEGLU_WIDE(192, 72)
