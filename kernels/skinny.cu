// The decoder's matrix products: a handful of token rows (N) against tall weights, bound by the weight stream.
//
// Weights lie on the M side of the MMA, tokens on N. A block owns 64 weight rows and a slice of K; the slices of one
// tile form a cluster whose blocks send each other their partial sums, which are added in rank order, so results do
// not depend on timing. Weights are packed in fragment order (load.cu), every lane copies only what it will use, and
// all of a block's weights are on their way before it waits for the kernel in front of it.
#include "common.cuh"

constexpr int kTile = 64;      // weight rows a block
constexpr int kStepK = 128;    // K a step: one bulk copy of activations
constexpr int kThreads = 128;  // 4 warps of 16 weight rows
constexpr int kStages = 3;     // steps of activations in flight
constexpr int kRed = 68;       // floats a row of sums: 64, padded against bank conflicts

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

__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// NT: token tiles of 8; C: blocks that share a tile, each with k / C of K. grid (C, tiles), cluster (C, 1, 1).
template <int NT, int EPI, int C>
__device__ __forceinline__ void skinny(const SkinnyArgs& a) {
    constexpr int kStride = 8 * NT + 2;
    constexpr uint32_t kStage = 16 * kStride * 16;      // bytes of 128 of K
    constexpr int kOwn = (8 * NT + C - 1) / C;          // token rows one rank finishes
    constexpr int kPerRow = EPI == kResidual ? 16 : 8;  // threads a row: 4 columns each, or 4 pairs
    constexpr int kItems = (kOwn * kPerRow + kThreads - 1) / kThreads;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float rinv[64];
    __shared__ uint64_t arrived[kStages], received;

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int rank = C == 1 ? 0 : blockIdx.x, tile = blockIdx.y;
    const int steps = a.slice / kStepK;
    bf16* sw = reinterpret_cast<bf16*>(shared);                  // [slice/32][4 warps][2][32][8]
    uint8_t* sx = shared + static_cast<size_t>(a.slice) * 128;   // [kStages][16][kStride][8] bf16
    float* red = reinterpret_cast<float*>(shared);               // [8·NT][kRed], over the weights once used
    float* inbox = red + 8 * NT * kRed;                          // [C][kOwn][64], behind it

    grid_launch_dependents();
    if (tid == 0) {
#pragma unroll
        for (int s = 0; s < kStages; s++) barrier_init(&arrived[s]);
        if constexpr (C > 1) {
            barrier_init(&received);
            barrier_expect(&received, (8 * NT - rank + C - 1) / C * 64 * 4 * C);
        }
    }
    // Weights never change, so they may be fetched before the wait.
    {
        const size_t at = warp * 512 + lane * 8;
        const bf16* from = a.w + (static_cast<size_t>(tile) * (a.k / 32) + static_cast<size_t>(rank) * (a.slice / 32)) * 2048 + at;
        for (int s = 0; s < steps; s++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                copy_async_16(sw + at + (s * 4 + c) * 2048, from + (s * 4 + c) * 2048);
                copy_async_16(sw + at + (s * 4 + c) * 2048 + 256, from + (s * 4 + c) * 2048 + 256);
            }
        copy_async_commit();
    }
    if (a.next && tid == 0) {
        const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y, id = static_cast<uint64_t>(tile) * C + rank;
        const uint64_t piece = (a.next_bytes / blocks) & ~static_cast<uint64_t>(127);
        if (piece) prefetch_l2(static_cast<const uint8_t*>(a.next) + id * piece, static_cast<uint32_t>(piece));
    }
    // What the end needs and nobody writes: rotations.
    const int half = a.head_dim / 2;
    float4 turn[EPI == kQkv ? kItems : 1][2];
    if constexpr (EPI == kQkv) {
        const int prefix = a.params->prefix;
#pragma unroll
        for (int it = 0; it < kItems; it++) {
            const int i = tid + it * kThreads, n = (i / 8) * C + rank, p = tile * 32 + 4 * (i % 8);
            if (p / half > a.heads || n >= a.rows) continue;
            const int key = n == a.horizon ? 0 : a.has_state + n;
            const float* cs = reinterpret_cast<const float*>(a.rope + static_cast<size_t>(prefix + key) * half + p % half);
            turn[it][0] = load4(cs), turn[it][1] = load4(cs + 4);
        }
    }
    grid_wait();

    const uint8_t* x = reinterpret_cast<const uint8_t*>(a.x) + static_cast<size_t>(rank) * steps * kStage;
    auto load_x = [&](int s) {
        uint64_t* barrier = &arrived[s % kStages];
        barrier_expect(barrier, kStage);
        copy_bulk(sx + (s % kStages) * kStage, x + static_cast<size_t>(s) * kStage, kStage, barrier);
    };
    if (tid == 0)
        for (int s = 0; s < min(steps, kStages); s++) load_x(s);

    // What the end needs of the kernels before: on its way while the product runs.
    float4 old[EPI == kResidual ? kItems : 1], next_scale[EPI == kResidual ? kItems : 1];
    if constexpr (EPI == kResidual) {
#pragma unroll
        for (int it = 0; it < kItems; it++) {
            const int i = tid + it * kThreads, n = (i / 16) * C + rank, m = tile * kTile + 4 * (i % 16);
            old[it] = make_float4(0, 0, 0, 0), next_scale[it] = old[it];
            if (n >= a.rows) continue;
            next_scale[it] = load4(a.scale + m);
            if (!a.init) old[it] = load4(a.h + static_cast<size_t>(n) * a.h_stride + m);
        }
    }
    // Two threads a row, each every second partial sum of squares.
    float squares[8] = {};
    if (EPI != kResidual && a.squares && tid / 2 < a.rows)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (tid % 2 + 2 * i < a.square_tiles) squares[i] = a.squares[(tid % 2 + 2 * i) * 64 + tid / 2];
    __syncthreads();  // the barriers are made

    // Even and odd halves of 32 of K in sums of their own: twice the independent MMAs.
    float acc[2][NT][4] = {};
    const int g = lane / 4, t = lane % 4;
    copy_async_wait<0>();
    for (int s = 0; s < steps; s++) {
        barrier_wait(&arrived[s % kStages], s / kStages & 1);
        const bf16* ws = sw + s * 4 * 2048 + warp * 512 + lane * 8;
        const bf16* xs = reinterpret_cast<const bf16*>(sx + (s % kStages) * kStage) + (t * kStride + g) * 8;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const uint4 top = *reinterpret_cast<const uint4*>(ws + c * 2048);
            const uint4 low = *reinterpret_cast<const uint4*>(ws + c * 2048 + 256);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4 xf = *reinterpret_cast<const uint4*>(xs + c * 4 * kStride * 8 + n * 64);
                mma_16816(acc[0][n], top.x, low.x, top.y, low.y, xf.x, xf.y);
                mma_16816(acc[1][n], top.z, low.z, top.w, low.w, xf.z, xf.w);
            }
        }
        if (s + kStages < steps) {
            __syncthreads();
            if (tid == 0) load_x(s + kStages);
        }
    }
    __syncthreads();
    // From here on this block's weights and activations may be overwritten, by its peers too.
    if constexpr (C > 1) cluster_arrive();

#pragma unroll
    for (int n = 0; n < NT; n++) {
        float* r = red + (8 * n + 2 * t) * kRed + warp * 16 + g;
        r[0] = acc[0][n][0] + acc[1][n][0];
        r[kRed] = acc[0][n][1] + acc[1][n][1];
        r[8] = acc[0][n][2] + acc[1][n][2];
        r[kRed + 8] = acc[0][n][3] + acc[1][n][3];
    }
    if constexpr (EPI != kResidual) {
        float sum = ((squares[0] + squares[1]) + (squares[2] + squares[3])) + ((squares[4] + squares[5]) + (squares[6] + squares[7]));
        for (int i = tid % 2 + 16; a.squares && tid / 2 < a.rows && i < a.square_tiles; i += 2) sum += a.squares[i * 64 + tid / 2];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        if (tid % 2 == 0) rinv[tid / 2] = a.squares ? rsqrtf(sum * a.inv_width + kRmsEps) : 1.0f;
    }
    __syncthreads();
    if constexpr (C > 1) cluster_wait();
    // Each row's sums to the rank that finishes it.
#pragma unroll
    for (int i = tid; i < 8 * NT * 16; i += kThreads) {
        const int n = i / 16, quad = i % 16;
        const float4 v = load4(red + n * kRed + quad * 4);
        float* to = inbox + (rank * kOwn + n / C) * 64 + quad * 4;
        if constexpr (C > 1)
            send(remote_address(to, n % C), v, remote_address(&received, n % C));
        else
            *reinterpret_cast<float4*>(to) = v;
    }
    if constexpr (C > 1)
        barrier_wait(&received, 0);
    else
        __syncthreads();

#pragma unroll
    for (int it = 0; it < kItems; it++) {
        const int i = tid + it * kThreads, own = i / kPerRow, n = own * C + rank;
        const bool valid = own < kOwn && n < a.rows;
        if constexpr (EPI == kResidual) {
            const int quad = i % 16, m = tile * kTile + 4 * quad;
            float squares = 0.0f;
            if (valid) {
                const float* r = inbox + own * 64 + quad * 4;
                float4 v = load4(r);
#pragma unroll
                for (int c = 1; c < C; c++) v = v + load4(r + c * kOwn * 64);
                if (a.init) {
                    if (a.bias) v = v + load4(a.bias + m);
                } else {
                    if (a.gate) v = v * load4(a.gate + m);
                    v = v + old[it];
                }
                *reinterpret_cast<float4*>(a.h + static_cast<size_t>(n) * a.h_stride + m) = v;
                *reinterpret_cast<uint2*>(a.hb + panel(n, m, kStride)) = pack_bf16x4(v * next_scale[it]);
                squares = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            }
            // Sixteen neighbouring lanes hold the 64 columns of one row.
#pragma unroll
            for (int o = 1; o < 16; o <<= 1) squares += __shfl_xor_sync(0xffffffffu, squares, o);
            if (valid && quad == 0) a.squares_out[tile * 64 + n] = squares;
        } else {
            if (!valid) continue;
            const int j = i % 8, slot = tile * kTile + 4 * j;
            const float* r = inbox + own * 64 + j * 4;
            float4 lo = load4(r), hi = load4(r + 32);
#pragma unroll
            for (int c = 1; c < C; c++) {
                lo = lo + load4(r + c * kOwn * 64);
                hi = hi + load4(r + c * kOwn * 64 + 32);
            }
            lo = lo * rinv[n], hi = hi * rinv[n];
            if (a.bias) lo = lo + load4(a.bias + slot), hi = hi + load4(a.bias + slot + 32);
            if constexpr (EPI == kGeglu) {
                const float4 v = make_float4(gelu_tanh(lo.x), gelu_tanh(lo.y), gelu_tanh(lo.z), gelu_tanh(lo.w)) * hi;
                *reinterpret_cast<uint2*>(a.y + panel(n, tile * 32 + 4 * j, kStride)) = pack_bf16x4(v);
            } else {
                // Packed so that a tile holds 32 pairs (i, i + head_dim/2) of the rotation.
                const int p = tile * 32 + 4 * j, head = p / half, d = p % half;
                if (head >= a.heads + 2) continue;
                const int key = n == a.horizon ? 0 : a.has_state + n;
                if (head <= a.heads) {
                    const float4 c0 = turn[it][0], c1 = turn[it][1], l = lo, u = hi;
                    lo = make_float4(l.x * c0.x - u.x * c0.y, l.y * c0.z - u.y * c0.w, l.z * c1.x - u.z * c1.y, l.w * c1.z - u.w * c1.w);
                    hi = make_float4(u.x * c0.x + l.x * c0.y, u.y * c0.z + l.y * c0.w, u.z * c1.x + l.z * c1.y, u.w * c1.z + l.w * c1.w);
                }
                bf16* out = head < a.heads    ? a.q + static_cast<size_t>(n) * a.q_stride + head * a.head_dim
                            : head == a.heads ? a.suffix_keys + static_cast<size_t>(key) * a.head_dim
                                              : a.suffix_values + static_cast<size_t>(key) * a.head_dim;
                *reinterpret_cast<uint2*>(out + d) = pack_bf16x4(lo);
                *reinterpret_cast<uint2*>(out + d + half) = pack_bf16x4(hi);
            }
        }
    }
}

#define KERNEL(NAME, EPI, NT, C)                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, 3) NAME##_##NT##_##C(                      \
        const __grid_constant__ SkinnyArgs a) {                                                       \
        skinny<NT, EPI, C>(a);                                                                        \
    }
#define FAMILY(NT, C)                        \
    KERNEL(skinny_qkv, kQkv, NT, C)          \
    KERNEL(skinny_geglu, kGeglu, NT, C)      \
    KERNEL(skinny_residual, kResidual, NT, C)
#define CLUSTERS(NT) FAMILY(NT, 1) FAMILY(NT, 2) FAMILY(NT, 4) FAMILY(NT, 8)
CLUSTERS(2)
CLUSTERS(4)
CLUSTERS(7)
CLUSTERS(8)
