// The decoder's matrix products: a handful of token rows (N) against tall weights, bound by the weight stream.
//
// Weights lie on the M side of the MMA, tokens on N. A block owns 64 weight rows and a slice of K; the slices of one
// tile form a cluster and add their partial sums through distributed shared memory in rank order, so results do not
// depend on timing. Weights are packed in fragment order (load.cu), every lane copies only what it will use, and all
// of a block's weights are on their way before it waits for the kernel in front of it.
#include "common.cuh"

constexpr int kTile = 64;      // weight rows a block
constexpr int kStepK = 128;    // K a step: 4 warps of 32
constexpr int kThreads = 256;  // 2 warps over M × 4 over K
constexpr int kRed = 68;       // floats a row of partial sums: 64, padded against bank conflicts

struct SkinnyArgs {
    const bf16* w;        // packed [tiles][k/32][4][2][32][8]
    const bf16* x;        // panel [k/8][stride][8]
    const float* squares;  // [square_tiles][64] partial sums of squares of the input rows, or null: no normalisation
    const float* bias;    // [tiles·64] in packed row order, or null
    const void* next;     // weights to move into L2 for a later kernel, or null
    uint64_t next_bytes;
    int32_t square_tiles;
    float inv_width;
    int32_t rows;         // valid token rows
    int32_t k;            // padded K
    int32_t slice;        // K of one block, a multiple of 128
    // Attention projections.
    bf16* q;              // [64, q_stride]
    bf16* suffix_keys;    // [1 + horizon, head_dim]
    bf16* suffix_values;
    const float2* rope;   // [positions, head_dim/2] cos, sin
    const DecodeParams* params;
    int32_t q_stride, heads, head_dim, horizon, has_state;
    // GeGLU.
    bf16* y;              // panel
    // Residual.
    float* h;             // [64, h_stride]
    bf16* hb;             // panel: h scaled by `scale`, the next product's input
    const float* scale;   // [tiles·64] of the next norm
    const float* gate;    // [tiles·64] adaptive gate, or null
    float* squares_out;   // [tiles][64]
    int32_t h_stride, init;  // init: h = product + bias instead of h += product
};

enum Epilogue { kQkv = 0, kGeglu = 1, kResidual = 2 };

constexpr float kRmsEps = 1e-6f;

template <int EPI>
__device__ __forceinline__ void finish(const SkinnyArgs& a, int tile, int n, int j, float4 lo, float4 hi, float rinv,
                                       int stride) {
    const int slot = tile * kTile + 4 * j;
    if (EPI != kResidual || a.init) {
        lo.x *= rinv, lo.y *= rinv, lo.z *= rinv, lo.w *= rinv;
        hi.x *= rinv, hi.y *= rinv, hi.z *= rinv, hi.w *= rinv;
        if (a.bias) {
            float4 bl = *reinterpret_cast<const float4*>(a.bias + slot);
            float4 bh = *reinterpret_cast<const float4*>(a.bias + slot + 32);
            lo.x += bl.x, lo.y += bl.y, lo.z += bl.z, lo.w += bl.w;
            hi.x += bh.x, hi.y += bh.y, hi.z += bh.z, hi.w += bh.w;
        }
    }
    if constexpr (EPI == kQkv) {
        // Packed so that a tile holds 32 pairs (i, i + head_dim/2) of the rotation.
        const int half = a.head_dim / 2, p = tile * 32 + 4 * j, head = p / half, i = p % half;
        if (n >= a.rows || head >= a.heads + 2) return;
        const bool state = n == a.horizon;
        const int key = state ? 0 : a.has_state + n;
        if (head <= a.heads) {
            const float4* cs = reinterpret_cast<const float4*>(a.rope + static_cast<size_t>(a.params->prefix + key) * half + i);
            float4 c0 = cs[0], c1 = cs[1];
            float4 l = lo, u = hi;
            lo = make_float4(l.x * c0.x - u.x * c0.y, l.y * c0.z - u.y * c0.w, l.z * c1.x - u.z * c1.y, l.w * c1.z - u.w * c1.w);
            hi = make_float4(u.x * c0.x + l.x * c0.y, u.y * c0.z + l.y * c0.w, u.z * c1.x + l.z * c1.y, u.w * c1.z + l.w * c1.w);
        }
        bf16* out = head < a.heads    ? a.q + static_cast<size_t>(n) * a.q_stride + head * a.head_dim
                    : head == a.heads ? a.suffix_keys + static_cast<size_t>(key) * a.head_dim
                                      : a.suffix_values + static_cast<size_t>(key) * a.head_dim;
        *reinterpret_cast<uint2*>(out + i) = pack_bf16x4(lo);
        *reinterpret_cast<uint2*>(out + i + half) = pack_bf16x4(hi);
    } else if constexpr (EPI == kGeglu) {
        if (n >= a.rows) return;
        float4 v = make_float4(gelu_tanh(lo.x) * hi.x, gelu_tanh(lo.y) * hi.y, gelu_tanh(lo.z) * hi.z, gelu_tanh(lo.w) * hi.w);
        *reinterpret_cast<uint2*>(a.y + panel(n, tile * 32 + 4 * j, stride)) = pack_bf16x4(v);
    } else {
        float sum = 0.0f;
        const bool valid = n < a.rows;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float4 v = part ? hi : lo;
            const int m = slot + 32 * part;
            float4* h = reinterpret_cast<float4*>(a.h + static_cast<size_t>(n) * a.h_stride + m);
            if (valid) {
                if (!a.init) {
                    if (a.gate) {
                        float4 g = *reinterpret_cast<const float4*>(a.gate + m);
                        v.x *= g.x, v.y *= g.y, v.z *= g.z, v.w *= g.w;
                    }
                    float4 old = *h;
                    v.x += old.x, v.y += old.y, v.z += old.z, v.w += old.w;
                }
                *h = v;
                float4 s = *reinterpret_cast<const float4*>(a.scale + m);
                *reinterpret_cast<uint2*>(a.hb + panel(n, m, stride)) =
                    pack_bf16x4(make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w));
                sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            }
        }
        // Eight neighbouring lanes hold the 64 columns of one row.
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        if (valid && j == 0) a.squares_out[tile * 64 + n] = sum;
    }
}

// NT: token tiles of 8. grid (cluster, tiles), cluster (k / slice, 1, 1).
template <int NT, int EPI>
__device__ __forceinline__ void skinny(const SkinnyArgs& a) {
    constexpr int kStride = 8 * NT + 2;
    constexpr int kStages = 3;                         // activation steps in flight
    constexpr int kStageElements = 16 * kStride * 8;   // 128 of K
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float rinv[64];

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, wm = warp & 1, wk = warp >> 1;
    const int ranks = gridDim.x, rank = blockIdx.x, tile = blockIdx.y;
    const int steps = a.slice / kStepK;
    bf16* sw = reinterpret_cast<bf16*>(shared);                       // [steps][8 warps][4][32][8]
    bf16* sx = sw + static_cast<size_t>(steps) * 8 * 4 * 256;         // [kStages][16][kStride][8]

    grid_launch_dependents();
    // Weights never change, so they may be fetched before the wait.
    {
        const bf16* w = a.w + (static_cast<size_t>(tile) * (a.k / 32) + static_cast<size_t>(rank) * (a.slice / 32)) * 2048;
        for (int s = 0; s < steps; s++) {
            const bf16* from = w + (static_cast<size_t>(s) * 4 + wk) * 2048 + wm * 1024 + lane * 8;
            bf16* to = sw + (static_cast<size_t>(s) * 8 + warp) * 1024 + lane * 8;
#pragma unroll
            for (int c = 0; c < 4; c++) copy_async_16(to + c * 256, from + c * 256);
        }
        copy_async_commit();
    }
    if (a.next && tid == 0) {
        const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y, id = static_cast<uint64_t>(tile) * ranks + rank;
        const uint64_t piece = (a.next_bytes / blocks) & ~static_cast<uint64_t>(127);
        if (piece) prefetch_l2(static_cast<const uint8_t*>(a.next) + id * piece, static_cast<uint32_t>(piece));
    }
    grid_wait();

    const bf16* x = a.x + static_cast<size_t>(rank) * (a.slice / 8) * kStride * 8;
    auto load_x = [&](int s) {
        if (s < steps) {
            const bf16* from = x + static_cast<size_t>(s) * kStageElements;
            bf16* to = sx + (s % kStages) * kStageElements;
            for (int i = tid; i < kStageElements / 8; i += kThreads) copy_async_16(to + i * 8, from + i * 8);
        }
        copy_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages; s++) load_x(s);

    if (tid < 64) {
        float sum = 0.0f;
        if (a.squares && tid < a.rows)
            for (int t = 0; t < a.square_tiles; t++) sum += a.squares[t * 64 + tid];
        rinv[tid] = a.squares ? rsqrtf(sum * a.inv_width + kRmsEps) : 1.0f;
    }

    float acc[2][NT][4] = {};
    const int g = lane / 4, t = lane % 4;
    for (int s = 0; s < steps; s++) {
        copy_async_wait<kStages - 1>();
        __syncthreads();
        const bf16* ws = sw + (static_cast<size_t>(s) * 8 + warp) * 1024 + lane * 8;
        const bf16* xs = sx + (s % kStages) * kStageElements + ((wk * 4 + t) * kStride + g) * 8;
        uint4 wf[4];
#pragma unroll
        for (int c = 0; c < 4; c++) wf[c] = *reinterpret_cast<const uint4*>(ws + c * 256);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 xf = *reinterpret_cast<const uint4*>(xs + n * 64);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const uint4 &top = wf[2 * m], &low = wf[2 * m + 1];
                mma_16816(acc[m][n], top.x, low.x, top.y, low.y, xf.x, xf.y);
                mma_16816(acc[m][n], top.z, low.z, top.w, low.w, xf.z, xf.w);
            }
        }
        __syncthreads();
        load_x(s + kStages);
    }
    copy_async_wait<0>();
    __syncthreads();

    // Partial sums of the four K warps, added in order.
    float* red = reinterpret_cast<float*>(shared);  // [4][8·NT][kRed]
    constexpr int kPart = 8 * NT * kRed;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float* r = red + wk * kPart + (8 * n + 2 * t) * kRed + wm * 32 + m * 16 + g;
            r[0] = acc[m][n][0];
            r[kRed] = acc[m][n][1];
            r[8] = acc[m][n][2];
            r[kRed + 8] = acc[m][n][3];
        }
    __syncthreads();
    for (int i = tid; i < 8 * NT * 16; i += kThreads) {
        float* r = red + (i / 16) * kRed + (i % 16) * 4;
        float4 v = *reinterpret_cast<float4*>(r);
#pragma unroll
        for (int w = 1; w < 4; w++) {
            float4 o = *reinterpret_cast<float4*>(r + w * kPart);
            v.x += o.x, v.y += o.y, v.z += o.z, v.w += o.w;
        }
        *reinterpret_cast<float4*>(r) = v;
    }
    if (ranks > 1)
        cluster_sync();
    else
        __syncthreads();

    // Rows are dealt to the ranks; the loop bound is a multiple of 32 threads so that shuffles are whole.
    const int mine = (8 * NT - rank + ranks - 1) / ranks, items = (mine * 8 + 31) / 32 * 32;
    for (int i = tid; i < items; i += kThreads) {
        const int n = (i / 8) * ranks + rank, j = i % 8;
        float4 lo = make_float4(0, 0, 0, 0), hi = lo;
        if (n < 8 * NT) {
            const float* r = red + n * kRed + 4 * j;
            for (int c = 0; c < ranks; c++) {
                float4 l = ranks > 1 ? load_cluster(r, c) : *reinterpret_cast<const float4*>(r);
                float4 u = ranks > 1 ? load_cluster(r + 32, c) : *reinterpret_cast<const float4*>(r + 32);
                lo.x += l.x, lo.y += l.y, lo.z += l.z, lo.w += l.w;
                hi.x += u.x, hi.y += u.y, hi.z += u.z, hi.w += u.w;
            }
        }
        finish<EPI>(a, tile, n, j, lo, hi, n < 64 ? rinv[n] : 0.0f, kStride);
    }
    // A peer may still be reading this block's sums.
    if (ranks > 1) cluster_sync();
}

#define SKINNY(NT)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) skinny_qkv_##NT(const __grid_constant__ SkinnyArgs a) {  \
        skinny<NT, kQkv>(a);                                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) skinny_geglu_##NT(const __grid_constant__ SkinnyArgs a) { \
        skinny<NT, kGeglu>(a);                                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) skinny_residual_##NT(                                    \
        const __grid_constant__ SkinnyArgs a) {                                                                        \
        skinny<NT, kResidual>(a);                                                                                      \
    }
SKINNY(2)
SKINNY(4)
SKINNY(7)
SKINNY(8)
