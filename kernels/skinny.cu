// The decoder's matrix products: a handful of token rows (N) against tall weights, bound by the weight stream.
//
// Weights lie on the M side of the MMA, tokens on N. A block owns 64 weight rows and a slice of K; the slices of one
// tile form a cluster whose blocks send each other their partial sums, which are added in rank order, so results do
// not depend on timing. Weights are packed in fragment order (load.cu), every lane copies only what it will use, and
// all of a block's weights are on their way before it waits for the kernel in front of it.
#include "skinny.cuh"

constexpr int kStepK = 128;    // K a step: one bulk copy of activations
constexpr int kThreads = 128;  // 4 warps of 16 weight rows
constexpr int kStages = 3;     // steps of activations in flight
constexpr int kRed = 68;       // floats a row of sums: 64, padded against bank conflicts

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
    float4 turn[EPI == kQkv ? kItems : 1][2];
    if constexpr (EPI == kQkv) {
        const int prefix = a.params->prefix;
#pragma unroll
        for (int it = 0; it < kItems; it++) {
            const int i = tid + it * kThreads;
            load_turn(a, (i / 8) * C + rank, tile * 32 + 4 * (i % 8), prefix, turn[it]);
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
                squares = store_residual(a, n, m, kStride, v, old[it], next_scale[it]);
            }
            // Sixteen neighbouring lanes hold the 64 columns of one row.
#pragma unroll
            for (int o = 1; o < 16; o <<= 1) squares += __shfl_xor_sync(0xffffffffu, squares, o);
            if (valid && quad == 0) a.squares_out[tile * 64 + n] = squares;
        } else {
            if (!valid) continue;
            const int j = i % 8, p = tile * 32 + 4 * j;
            const float* r = inbox + own * 64 + j * 4;
            float4 lo = load4(r), hi = load4(r + 32);
#pragma unroll
            for (int c = 1; c < C; c++) {
                lo = lo + load4(r + c * kOwn * 64);
                hi = hi + load4(r + c * kOwn * 64 + 32);
            }
            finish_pairs(a, p, rinv[n], lo, hi);
            if constexpr (EPI == kGeglu)
                store_geglu(a, n, p, kStride, lo, hi);
            else
                store_qkv(a, n, p, lo, hi, turn[it]);
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
