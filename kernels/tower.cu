// The four products of a SigLIP layer on sm_90a, the norms before them folded in, and those around the trunk's attention:
// queries, keys and values with the norm before them folded in and rotated behind, and the output projection, whose norm
// geglu_wide.cu folds in.
//
// A norm in front of a product is r·(x − μ)·γ + β for each token, so w·norm(x) = r·(w·(xγ) − μ·S) + B with S = w·γ and
// B = w·β + bias, which do not depend on the token. Whatever adds to the residual therefore leaves xγ in bf16 for the next
// product, and the sums of x and x² over its 64 features, of which the next one makes μ and r while its weights arrive.
//
// Weights are the rows of the matrix instructions and tokens their columns. A block multiplies kGroups tiles of 64 weight
// rows by kTokens tokens: four warps a tile, and one warp that fetches. One tile sums K in order, so results depend
// neither on the number of blocks nor on the cut.
//
// Packed weights: [outputs/64][K/64][64 rows][64] in the 128-byte swizzle; feature 16·w + 2·g + h of a tile is row
// 16·w + g + 8·h: a thread has two features side by side. Where they are rotated, a tile is 32 pairs of a head, and row
// 16·w + g + 8·h is half h of pair 8·w + g. Packed activations: [K/64][octets][8 tokens][64], the same swizzle.
#include "wgmma.cuh"

struct TowerArgs {
    const bf16* w;          // packed
    const bf16* x;          // packed
    const float2* moments;  // [width_tiles][tokens]: sums over some features of what the norm is of, and of its squares
    const float* fold;      // [outputs]: S
    const float* bias;      // [outputs]: B, or where nothing is normed the bias or null
    float* residual;        // [tokens, outputs], added to
    const float* scale;     // [outputs]: γ of the next norm; null: none follows
    bf16* y;
    float2* left;           // moments of the residual for the next norm
    int32_t tokens, octets;  // octets: tokens/8 rounded up; what tokens past the last hold is of no meaning
    int32_t token_tiles;     // tiles of kTokens
    int32_t tiles;           // tiles of 64 outputs
    int32_t weight_tiles;    // blocks' shares of them
    int32_t k_blocks;        // K/64, even
    int32_t width_tiles;
    float inv_width, eps;
    int32_t heads;             // rotated: of queries; one of keys and one of values follow
    int32_t layer, cache_row;  // cache_row: elements from one row of the cache to the next
    const float2* rope;        // [tokens][kPairs]: cosine and sine
    const EncodeParams* params;
};

constexpr int kPairs = 128;  // of a rotated head

// What becomes of the sums.
enum Kind {
    kRows,  // normed: y is [tokens, outputs]
    kGelu,  // normed, then GELU: y is packed
    kAdd,   // added to the residual: y is packed, times `scale`
    kRotated,  // normed without a mean: rotated queries go to y, [tokens, outputs], rotated keys and values to the cache
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

WGMMA(wgmma, 48, 24, 24, 25, 26, 0)
WGMMA(wgmma, 64, 32, 32, 33, 34, 0)
WGMMA(wgmma, 72, 36, 36, 37, 38, 0)
WGMMA(wgmma, 80, 40, 40, 41, 42, 0)
WGMMA(wgmma, 88, 44, 44, 45, 46, 0)
WGMMA(wgmma, 96, 48, 48, 49, 50, 0)
WGMMA(wgmma, 104, 52, 52, 53, 54, 0)
WGMMA(wgmma, 112, 56, 56, 57, 58, 0)
WGMMA(wgmma, 128, 64, 64, 65, 66, 0)
WGMMA(wgmma, 136, 68, 68, 69, 70, 0)
WGMMA(wgmma, 160, 80, 80, 81, 82, 0)
WGMMA(wgmma, 176, 88, 88, 89, 90, 0)
WGMMA(wgmma, 184, 92, 92, 93, 94, 0)
WGMMA(wgmma, 200, 100, 100, 101, 102, 0)

__device__ __forceinline__ void store_bulk(void* global, const void* shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                 "cp.async.bulk.commit_group;" ::"l"(global), "r"(smem_address(shared)), "r"(bytes)
                 : "memory");
}
// What bulk stores read may be written again.
__device__ __forceinline__ void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// gelu_tanh of two values with one reciprocal. Powers are kept below 2^60, so that their product is finite; x·2^-60 is as
// good as 0.
__device__ __forceinline__ uint32_t gelu_pair(float u, float v) {
    constexpr float kLinear = -2.0f * 1.4426950408889634f * 0.7978845608028654f, kCubic = kLinear * 0.044715f;
    const float a = 1.0f + exp2_fast(fminf(u * fmaf(kCubic, u * u, kLinear), 60.0f));
    const float b = 1.0f + exp2_fast(fminf(v * fmaf(kCubic, v * v, kLinear), 60.0f));
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a * b));
    return pack_bf16(u * (b * inverse), v * (a * inverse));
}

// One block's part.
template <Kind kKind, int kGroups, int kTokens>
struct Tower {
    static constexpr bool kAdds = kKind == kAdd;
    static constexpr bool kTurns = kKind == kRotated;
    static constexpr int kDeep = kGroups == 1 && kTokens <= 136 ? 2 : 1;  // times 64 of K a stage
    static constexpr int kTile = 64 * 128, kPanel = kTokens * 128, kPart = kGroups * kTile;
    static constexpr int kStage = kDeep * (kPart + kPanel);
    static constexpr int kThreads = kGroups * 128;   // that multiply
    static constexpr int kResults = kGroups * kPanel;
    static constexpr int kSmall = (kAdds ? 4 * kGroups : 1) * kTokens * 8;
    static constexpr int kFit = (225 * 1024 - kResults - kSmall) / kStage, kStages = kFit < 8 ? kFit : 8;
    static_assert(kTokens % 8 == 0 && kStages >= 3, "tokens of a tile");

    const TowerArgs& a;
    uint8_t* ring;     // stages: weights, then activations
    uint8_t* results;  // [group][token][64], swizzled
    float2* small;     // [group][warp][token]: moments over its 16 features; or [token]: mean and inverse deviation
    uint64_t *full, *empty;

    __device__ __forceinline__ int units() const { return a.weight_tiles * a.token_tiles; }
    __device__ __forceinline__ int tile(int unit) const { return unit / a.token_tiles * kGroups; }
    __device__ __forceinline__ int token(int unit) const { return unit % a.token_tiles * kTokens; }

    // One thread keeps the ring filled. Weights do not wait for the kernel before this one.
    __device__ __forceinline__ void produce() const {
        const uint64_t policy = passing();
        Slot<kStages> slot;
        const int stages = a.k_blocks / kDeep;
        for (int unit = blockIdx.x; unit < units(); unit += gridDim.x) {
            const int octets = min(kTokens / 8, a.octets - token(unit) / 8), groups = min(kGroups, a.tiles - tile(unit));
            const size_t each = static_cast<size_t>(a.k_blocks) * (64 * 64);
            const bf16* w = a.w + tile(unit) * each;
            const bf16* x = a.x + token(unit) / 8 * 512;
            auto weights = [&](int s) {
                barrier_expect(&full[s], kDeep * (groups * kTile + octets * 1024));
                for (int g = 0; g < groups; g++) copy_bulk(ring + s * kStage + g * kTile, w + g * each, kDeep * kTile, &full[s], policy);
                w += kDeep * 64 * 64;
            };
            int begun = 0;
            if (unit == static_cast<int>(blockIdx.x)) {
                for (; begun < min(kStages, stages); begun++) weights(begun);
                grid_wait();
            }
            for (int k = 0; k < stages; k++, slot.next()) {
                if (k >= begun) {
                    barrier_wait(&empty[slot.index], slot.parity ^ 1);
                    weights(slot.index);
                }
#pragma unroll
                for (int deep = 0; deep < kDeep; deep++, x += static_cast<size_t>(a.octets) * 512)
                    copy_bulk(ring + slot.index * kStage + kDeep * kPart + deep * kPanel, x, octets * 1024, &full[slot.index]);
            }
        }
        grid_wait();
    }

    // One warp finds mean and inverse deviation of each token while the others multiply.
    __device__ __forceinline__ void measure() const {
        grid_wait();
        for (int unit = blockIdx.x; unit < units(); unit += gridDim.x) {
            if (unit != static_cast<int>(blockIdx.x)) meet(2, kThreads + 32);
            for (int n = threadIdx.x % 32; n < kTokens; n += 32) {
                const int at = min(token(unit) + n, a.tokens - 1);
                float sum = 0.0f, squares = 0.0f;
#pragma unroll (kTurns ? 4 : 18)
                for (int i = 0; i < a.width_tiles; i++) {
                    const float2 m = a.moments[static_cast<size_t>(i) * a.tokens + at];
                    sum += m.x, squares += m.y;
                }
                const float mean = kTurns ? 0.0f : sum * a.inv_width;
                small[n] = make_float2(mean, rsqrtf(fmaxf(squares * a.inv_width - mean * mean, 0.0f) + a.eps));
            }
            __syncwarp();
            pass(1, kThreads + 32);
        }
    }

    // d: rows g and g + 8 of every 16, tokens 8·i + 2·t and the next.
    __device__ __forceinline__ void multiply(float (&d)[kTokens / 2], Slot<kStages>& slot, int group) const {
        const uint64_t weights = tile_descriptor(ring, 16, 1024), tokens = tile_descriptor(ring + kDeep * kPart, 16, 1024);
        const int stages = a.k_blocks / kDeep, lane = threadIdx.x % 32;
        auto leave = [&](int s) {
            if (lane == 0) barrier_arrive(&empty[s]);
        };
        int before = 0;
        for (int k = 0; k < stages; k++) {
            barrier_wait(&full[slot.index], slot.parity);
            wgmma_fence();
            const uint32_t at = slot.index * (kStage / 16);
            const uint32_t rows = static_cast<uint32_t>(weights) + at + group * (kTile / 16);
            const uint32_t columns = static_cast<uint32_t>(tokens) + at;
#pragma unroll
            for (int kk = 0; kk < 4 * kDeep; kk++)
                wgmma(d, with_upper(rows + kk / 4 * (kPart / 16) + kk % 4 * 2, weights),
                      with_upper(columns + kk / 4 * (kPanel / 16) + kk % 4 * 2, tokens), kk || k);
            wgmma_commit();
            // The matrices of the stage before have been read.
            wgmma_wait<1>();
            if (k) leave(before);
            before = slot.index;
            slot.next();
        }
        wgmma_wait<0>();
        leave(before);
        // No sum is looked at before this.
#pragma unroll
        for (int i = 0; i < kTokens / 2; i++) asm volatile("" : "+f"(d[i])::"memory");
    }

    // Where a thread's features of token 8·i + 2·t + e go in packed results, i = 0.
    __device__ __forceinline__ uint8_t* place(uint8_t* results, int e) const {
        const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        return results + (2 * t + e) * 128 + ((warp * 2 + g / 4) ^ (2 * t + e)) * 16 + g % 4 * 4;
    }

    // Packed results of one tile of features go to y, after all four warps have written them.
    __device__ __forceinline__ void store_packed(const uint8_t* results, int own, int token, int barrier) const {
        fence_async();
        meet(barrier, 128);
        if (threadIdx.x % 128 == 0 && own < a.tiles)
            store_bulk(a.y + (static_cast<size_t>(own) * a.octets + token / 8) * 512, results, min(kTokens / 8, a.octets - token / 8) * 1024);
    }

    // To the residual, and what the next norm wants of it.
    __device__ __forceinline__ void add(int group) const {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, barrier = 1 + group;
        uint8_t* mine = results + group * kPanel;
        float2* moments = small + group * 4 * kTokens;
        const size_t outputs = static_cast<size_t>(a.tiles) * 64;
        Slot<kStages> slot;
        for (int unit = blockIdx.x; unit < units(); unit += gridDim.x) {
            const bool another = unit + static_cast<int>(gridDim.x) < units();
            const int own = tile(unit) + group, first = token(unit);
            const bool is = kGroups == 1 || own < a.tiles;
            const int feature = own * 64 + warp * 16 + 2 * g;  // and the next
            const float2 bias = a.bias && is ? *reinterpret_cast<const float2*>(a.bias + feature) : float2{};
            const float2 scale = a.scale && is ? *reinterpret_cast<const float2*>(a.scale + feature) : float2{};
            if (unit == static_cast<int>(blockIdx.x)) grid_wait();
            auto there = [&](int i, int e) { return is && first + 8 * i + 2 * t + e < a.tokens; };
            // Of so many octets of tokens the residual is fetched while the product runs, of the rest behind it.
            constexpr int kEarly = kTokens <= 112 ? kTokens / 8 : kTokens <= 136 ? 14 : 8;
            float2 before[kTokens / 8][2];
            float* residual = a.residual + (first + 2 * t) * outputs + feature;
            auto fetch = [&](int i) {
#pragma unroll
                for (int e = 0; e < 2; e++)
                    before[i][e] = there(i, e) ? *reinterpret_cast<const float2*>(residual + (8 * i + e) * outputs) : float2{};
            };
#pragma unroll
            for (int i = 0; i < kEarly; i++) fetch(i);
            float d[kTokens / 2];
            multiply(d, slot, group);
            // Moments of two octets of tokens at a time: each step of the sum over g halves what a thread keeps.
            uint8_t* to[2] = {place(mine, 0), place(mine, 1)};
#pragma unroll
            for (int i = 0; i < kTokens / 8; i += 2) {
                // Into registers that the octets before have left.
#pragma unroll
                for (int j = kEarly + i; j < kEarly + i + 2; j++)
                    if (j < kTokens / 8) fetch(j);
                float kept[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float sum[2] = {}, squares[2] = {};
                    if (i + j < kTokens / 8)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const float2 b = before[i + j][e];
                            const float* s = &d[4 * (i + j) + e];
                            const float2 v = make_float2(b.x + (s[0] + bias.x), b.y + (s[2] + bias.y));
                            if (there(i + j, e)) *reinterpret_cast<float2*>(residual + (8 * (i + j) + e) * outputs) = v;
                            *reinterpret_cast<uint32_t*>(to[e] + (i + j) * 1024) = pack_bf16(v.x * scale.x, v.y * scale.y);
                            sum[e] = v.x + v.y, squares[e] = v.x * v.x + v.y * v.y;
                        }
                    const bool odd = lane & 16, second = lane & 8;
                    const float s = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(0xffffffffu, odd ? sum[0] : sum[1], 16);
                    const float q = (odd ? squares[1] : squares[0]) + __shfl_xor_sync(0xffffffffu, odd ? squares[0] : squares[1], 16);
                    kept[j] = (second ? q : s) + __shfl_xor_sync(0xffffffffu, second ? s : q, 8);
                }
                const bool later = lane & 4;
                const float m = (later ? kept[1] : kept[0]) + __shfl_xor_sync(0xffffffffu, later ? kept[0] : kept[1], 4);
                const int n = 8 * (i + (lane / 4 & 1)) + 2 * t + lane / 16;
                if (n < kTokens) reinterpret_cast<float*>(moments + warp * kTokens + n)[lane / 8 & 1] = m;
            }
            if (a.scale) {
                store_packed(mine, own, first, barrier);
                for (int n = threadIdx.x % 128; n < min(kTokens, a.tokens - first) && is; n += 128) {
                    const float2 *p = moments + n, *q = p + kTokens, *r = q + kTokens, *s = r + kTokens;
                    a.left[static_cast<size_t>(own) * a.tokens + first + n] = make_float2(p->x + q->x + (r->x + s->x), p->y + q->y + (r->y + s->y));
                }
            }
            if (threadIdx.x % 128 == 0) stores_read();
            if (another) meet(barrier, 128);
        }
    }

    // Normed; for fc1 GELU, queries and keys rotated.
    __device__ __forceinline__ void norm(int group) const {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, barrier = 3 + group;
        uint8_t* mine = results + group * kPanel;
        Slot<kStages> slot;
        for (int unit = blockIdx.x; unit < units(); unit += gridDim.x) {
            const bool another = unit + static_cast<int>(gridDim.x) < units();
            const int own = tile(unit) + group, first = token(unit), feature = own * 64 + warp * 16 + 2 * g;
            float2 fold = {}, bias = {};
            // Of a head: cosines and sines for the thread's pair of features. Values do not turn.
            const int head = own * 32 / kPairs, pairs = own * 32 % kPairs;
            constexpr int kEarly = !kTurns ? 0 : kTokens / 8 < 14 ? kTokens / 8 : 14;
            float2 turn[kTokens / 8][2];
            auto fetch = [&](int i) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    turn[i][e] = make_float2(1.0f, 0.0f);
                    if (head <= a.heads) turn[i][e] = a.rope[min(first + 8 * i + 2 * t + e, a.tokens - 1) * kPairs + pairs + warp * 8 + g];
                }
            };
#pragma unroll
            for (int i = 0; i < kEarly; i++) fetch(i);
            if (!kTurns && own < a.tiles) {
                fold = *reinterpret_cast<const float2*>(a.fold + feature);
                bias = *reinterpret_cast<const float2*>(a.bias + feature);
            }
            if (unit == static_cast<int>(blockIdx.x)) grid_wait();
            float d[kTokens / 2];
            multiply(d, slot, group);
            meet(1, kThreads + 32);
            uint8_t* to[2] = {place(mine, 0), place(mine, 1)};
            uint8_t* halves = mine + lane % 8 * 128 + ((lane / 8 % 2 * 4 + warp) ^ lane % 8) * 16;
#pragma unroll
            for (int i = 0; i < kTokens / 8; i++) {
                const float4 n = *reinterpret_cast<const float4*>(small + 8 * i + 2 * t);
                if constexpr (kTurns) {
                    if (i + kEarly < kTokens / 8) fetch(i + kEarly);
                    float low[2], high[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float inverse = e ? n.w : n.y, x = d[4 * i + e] * inverse, y = d[4 * i + 2 + e] * inverse;
                        const float2 c = turn[i][e];
                        low[e] = x * c.x - y * c.y, high[e] = y * c.x + x * c.y;
                    }
                    store_transposed(halves + i * 1024, pack_bf16(low[0], low[1]), pack_bf16(high[0], high[1]));
                } else {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float mean = e ? n.z : n.x, inverse = e ? n.w : n.y;
                        const float u = fmaf(inverse, fmaf(-mean, fold.x, d[4 * i + e]), bias.x);
                        const float v = fmaf(inverse, fmaf(-mean, fold.y, d[4 * i + 2 + e]), bias.y);
                        *reinterpret_cast<uint32_t*>(to[e] + i * 1024) = kKind == kGelu ? gelu_pair(u, v) : pack_bf16(u, v);
                    }
                }
            }
            if (another) pass(2, kThreads + 32);
            if constexpr (kKind == kGelu) {
                store_packed(mine, own, first, barrier);
                if (threadIdx.x % 128 == 0) stores_read();
                if (another) meet(barrier, 128);
                continue;
            }
            meet(barrier, 128);
            // Eight threads store 64 features of a token, side by side or in two halves of a head.
            bf16* y = a.y + own * 64 + lane % 8 * 8;
            int row = a.tiles * 64;
            if (kTurns) {
                y = a.y + head * 2 * kPairs;
                if (head >= a.heads) {
                    y = (head == a.heads ? a.params->keys : a.params->values) + a.layer * a.params->layer_stride;
                    row = a.cache_row;
                }
                y += lane % 8 / 4 * kPairs + pairs + lane % 4 * 8;
            }
            y += static_cast<size_t>(first) * row;
#pragma unroll
            for (int n = warp * 4 + lane / 8; n < (kTokens + 15) / 16 * 16; n += 16)
                if (n < kTokens && first + n < a.tokens && own < a.tiles)
                    *reinterpret_cast<uint4*>(y + static_cast<size_t>(n) * row) = *reinterpret_cast<const uint4*>(mine + n * 128 + ((lane % 8) ^ (n % 8)) * 16);
            if (another) meet(barrier, 128);
        }
    }
};

#endif

template <Kind kKind, int kGroups, int kTokens>
__device__ __forceinline__ void tower(const TowerArgs& a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Block = Tower<kKind, kGroups, kTokens>;
    extern __shared__ uint8_t raw[];
    __shared__ uint64_t barriers[2 * Block::kStages];
    uint64_t *full = barriers, *empty = full + Block::kStages;
    // The compiler shall see that this is the same for a warp: descriptors made of it stay in uniform registers.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    grid_launch_dependents();
    if (threadIdx.x == 0) {
        for (int s = 0; s < Block::kStages; s++) {
            barrier_init(&full[s], 1);
            barrier_init(&empty[s], 4 * kGroups);  // the warps that multiply
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    uint8_t* ring = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint8_t* results = ring + Block::kStages * Block::kStage;
    const Block block{a, ring, results, reinterpret_cast<float2*>(results + Block::kResults), full, empty};
    if (warp < 4 * kGroups) {
        if constexpr (Block::kAdds)
            block.add(kGroups == 1 ? 0 : warp / 4);
        else
            block.norm(warp / 4);
    } else if (warp > 4 * kGroups) {
        block.measure();
    } else if (threadIdx.x % 32 == 0) {
        block.produce();
    } else {
        grid_wait();
    }
#else
    __trap();
#endif
}

#define TOWER(KIND, NAME, GROUPS, TOKENS)                                                                          \
    extern "C" __global__ void __launch_bounds__(128 * GROUPS + (KIND == kAdd ? 32 : 64), 1)                      \
        tower_##NAME##_##GROUPS##_##TOKENS(const __grid_constant__ TowerArgs a) {                                  \
        tower<KIND, GROUPS, TOKENS>(a);                                                                            \
    }
TOWER(kRows, rows, 2, 64)
TOWER(kRows, rows, 2, 128)
TOWER(kRows, rows, 3, 80)
TOWER(kRows, rows, 3, 112)
TOWER(kRows, rows, 3, 128)
TOWER(kGelu, gelu, 2, 88)
TOWER(kGelu, gelu, 2, 128)
TOWER(kGelu, gelu, 3, 104)
TOWER(kGelu, gelu, 3, 160)
TOWER(kGelu, gelu, 3, 176)
TOWER(kAdd, add, 1, 48)
TOWER(kAdd, add, 1, 80)
TOWER(kAdd, add, 1, 112)
TOWER(kAdd, add, 1, 72)
TOWER(kAdd, add, 1, 128)
TOWER(kAdd, add, 1, 136)
TOWER(kAdd, add, 1, 200)
TOWER(kAdd, add, 2, 112)
TOWER(kRotated, rotated, 1, 48)
TOWER(kRotated, rotated, 1, 96)
TOWER(kRotated, rotated, 1, 184)
TOWER(kRotated, rotated, 2, 136)
TOWER(kRotated, rotated, 2, 184)

struct TowerBeginArgs {
    const float* x;      // [tokens, width]
    const float* scale;  // [width]
    bf16* y;             // packed
    float2* moments;     // [width/64][tokens]
    int32_t tokens, width;  // width a multiple of 64
};

// What the first norm of the tower needs of its residual. One block a token.
extern "C" __global__ void __launch_bounds__(256) tower_begin(const __grid_constant__ TowerBeginArgs a) {
    grid_launch_dependents();
    grid_wait();
    const int token = blockIdx.x, quads = a.width / 4;
    const float4* x = reinterpret_cast<const float4*>(a.x + static_cast<size_t>(token) * a.width);
    for (int from = 0; from < quads; from += 256) {
        const int c = from + threadIdx.x;
        const float4 v = c < quads ? x[c] : float4{};
        float sum = v.x + v.y + (v.z + v.w), squares = v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
#pragma unroll
        for (int o = 8; o > 0; o /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, o);
            squares += __shfl_xor_sync(0xffffffffu, squares, o);
        }
        if (c >= quads) continue;
        if (c % 16 == 0) a.moments[static_cast<size_t>(c / 16) * a.tokens + token] = make_float2(sum, squares);
        const float4 s = reinterpret_cast<const float4*>(a.scale)[c];
        bf16* y = a.y + ((static_cast<size_t>(c / 16) * (a.tokens / 8) + token / 8) * 8 + token % 8) * 64 + ((c % 16 / 2) ^ (token % 8)) * 8 + c % 2 * 4;
        *reinterpret_cast<uint2*>(y) = pack_bf16x4(make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w));
    }
}

struct TowerFoldArgs {
    const bf16* w;       // packed
    const float* scale;  // [64·k_blocks]: γ
    const float* shift;  // [64·k_blocks]: β
    const float* bias;   // [outputs], or null
    float* fold;         // [64·tiles]: S
    float* folded_bias;  // [64·tiles]: B
    int32_t outputs, tiles, k_blocks;
};

// Once per checkpoint. One warp an output.
extern "C" __global__ void __launch_bounds__(256) tower_fold(const __grid_constant__ TowerFoldArgs a) {
    const int f = (blockIdx.x * 256 + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (f >= 64 * a.tiles) return;
    const int in = f % 64, row = in / 16 * 16 + in % 16 / 2 + in % 2 * 8;
    float on_scale = 0.0f, on_shift = 0.0f;
    for (int k = lane; k < 64 * a.k_blocks; k += 32) {
        const float w = __bfloat162float(a.w[((static_cast<size_t>(f / 64) * a.k_blocks + k / 64) * 64 + row) * 64 + ((k % 64 / 8) ^ (row % 8)) * 8 + k % 8]);
        on_scale = fmaf(w, a.scale[k], on_scale);
        on_shift = fmaf(w, a.shift[k], on_shift);
    }
    on_scale = warp_sum(on_scale), on_shift = warp_sum(on_shift);
    if (lane == 0) {
        a.fold[f] = on_scale;
        a.folded_bias[f] = on_shift + (a.bias && f < a.outputs ? a.bias[f] : 0.0f);
    }
}
