// Bidirectional attention of the encoder (SigLIP and the prefix trunk): online softmax over tiles of 64 keys.
//
// Eight warps: four times 16 query rows, and for each two warps that take half of every key tile and join at the end.
#include "common.cuh"

constexpr int kRows = 64, kKeys = 64, kThreads = 256;

struct AttentionArgs {
    const bf16* q;  // element (batch, row, head, d) at batch·q_batch + row·q_row + head·head_dim + d
    const bf16* k;  // element (batch, key, head, d) at batch·kv_batch + key·kv_row + head·kv_head + d; null: the cache
    const bf16* v;
    bf16* out;      // element (batch, row, head, d) at batch·out_batch + row·out_row + head·head_dim + d
    const EncodeParams* params;
    int64_t q_batch, kv_batch, out_batch;
    int32_t q_row, kv_row, kv_head, out_row, rows, keys, head_dim, layer;
    float scale;    // 1/√head_dim · log2(e)
};

template <int HD>
__device__ __forceinline__ void attention(const AttentionArgs& a) {
    constexpr int kQ = HD + 8;
    extern __shared__ __align__(128) uint8_t shared[];
    bf16* sq = reinterpret_cast<bf16*>(shared);  // [64][kQ]
    bf16* skv = sq + kRows * kQ;                 // [2 stages][K, V][64][kQ]
    const int tid = threadIdx.x, warp = tid / 32 % 4, part = tid / 128, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int row0 = blockIdx.x * kRows, head = blockIdx.y, batch = blockIdx.z;
    grid_launch_dependents();
    grid_wait();
    const bf16* q = a.q + batch * a.q_batch + head * a.head_dim;
    const bf16 *k, *v;
    if (a.k) {
        k = a.k + batch * a.kv_batch + head * a.kv_head;
        v = a.v + batch * a.kv_batch + head * a.kv_head;
    } else {
        k = a.params->keys + a.layer * a.params->layer_stride;
        v = a.params->values + a.layer * a.params->layer_stride;
    }
    auto load = [&](bf16* to, const bf16* from, int first, int limit, int row_stride) {
        for (int i = tid; i < 64 * (HD / 8); i += kThreads) {
            const int r = i / (HD / 8), d = (i % (HD / 8)) * 8;
            if (first + r < limit && d < a.head_dim)
                copy_async_16(to + r * kQ + d, from + static_cast<size_t>(first + r) * row_stride + d);
            else
                store_zero_16(to + r * kQ + d);
        }
    };
    const int tiles = (a.keys + kKeys - 1) / kKeys;
    load(sq, q, row0, a.rows, a.q_row);
    load(skv, k, 0, a.keys, a.kv_row);
    load(skv + kKeys * kQ, v, 0, a.keys, a.kv_row);
    copy_async_commit();

    float o[HD / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    for (int tile = 0; tile < tiles; tile++) {
        bf16* sk = skv + (tile & 1) * 2 * kKeys * kQ;
        bf16* sv = sk + kKeys * kQ + part * 32 * kQ;
        if (tile + 1 < tiles) {
            bf16* nk = skv + ((tile + 1) & 1) * 2 * kKeys * kQ;
            load(nk, k, (tile + 1) * kKeys, a.keys, a.kv_row);
            load(nk + kKeys * kQ, v, (tile + 1) * kKeys, a.keys, a.kv_row);
        }
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        sk += part * 32 * kQ;
        float s[4][4] = {};
#pragma unroll
        for (int d = 0; d < HD; d += 16) {
            uint32_t af[4];
            ldmatrix_x4(af, sq + (warp * 16 + lane % 16) * kQ + d + (lane / 16) * 8);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                uint32_t bf[4];  // keys j·8..+8 and (j+1)·8..+8, each k lower and upper half
                ldmatrix_x4(bf, sk + (j * 8 + (lane / 16) * 8 + lane % 8) * kQ + d + ((lane / 8) % 2) * 8);
                mma_16816(s[j], af[0], af[1], af[2], af[3], bf[0], bf[1]);
                mma_16816(s[j + 1], af[0], af[1], af[2], af[3], bf[2], bf[3]);
            }
        }
        const int left = a.keys - tile * kKeys - part * 32;
        float peak[2] = {top[0], top[1]};
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[j][e] = j * 8 + 2 * t + (e & 1) < left ? s[j][e] * a.scale : -INFINITY;
                peak[e / 2] = fmaxf(peak[e / 2], s[j][e]);
            }
        float fix[2], low[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 1));
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 2));
            low[r] = peak[r] == -INFINITY ? 0.0f : peak[r];  // no key seen yet
            fix[r] = exp2_fast(top[r] - low[r]);
            top[r] = peak[r];
        }
        uint32_t p[4][2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = exp2_fast(s[j][e] - low[e / 2]);
            p[j][0] = pack_bf16(s[j][0], s[j][1]);
            p[j][1] = pack_bf16(s[j][2], s[j][3]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 back = unpack_bf16(p[j][r]);
                added[r] += back.x + back.y;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            added[r] += __shfl_xor_sync(0xffffffffu, added[r], 1);
            added[r] += __shfl_xor_sync(0xffffffffu, added[r], 2);
            sum[r] = sum[r] * fix[r] + added[r];
        }
#pragma unroll
        for (int j = 0; j < HD / 8; j++) o[j][0] *= fix[0], o[j][1] *= fix[0], o[j][2] *= fix[1], o[j][3] *= fix[1];
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
#pragma unroll
            for (int j = 0; j < HD / 8; j += 2) {
                uint32_t bf[4];
                ldmatrix_x4_trans(bf, sv + (kk * 16 + lane % 16) * kQ + j * 8 + (lane / 16) * 8);
                mma_16816(o[j], p[2 * kk][0], p[2 * kk][1], p[2 * kk + 1][0], p[2 * kk + 1][1], bf[0], bf[1]);
                mma_16816(o[j + 1], p[2 * kk][0], p[2 * kk][1], p[2 * kk + 1][0], p[2 * kk + 1][1], bf[2], bf[3]);
            }
        }
        __syncthreads();
    }
    // The second half hands over through the memory of the keys.
    constexpr int kO = HD + 4;
    float* so = reinterpret_cast<float*>(skv);              // [64][kO]
    float2* rows = reinterpret_cast<float2*>(so + 64 * kO);  // [64] maximum and sum
    const int own = warp * 16 + g;
    copy_async_wait<0>();
    __syncthreads();
    if (part == 1) {
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            *reinterpret_cast<float2*>(so + own * kO + j * 8 + 2 * t) = make_float2(o[j][0], o[j][1]);
            *reinterpret_cast<float2*>(so + (own + 8) * kO + j * 8 + 2 * t) = make_float2(o[j][2], o[j][3]);
        }
        if (t == 0) rows[own] = make_float2(top[0], sum[0]), rows[own + 8] = make_float2(top[1], sum[1]);
    }
    __syncthreads();
    if (part == 1) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + own + r * 8;
        if (row >= a.rows) continue;
        const float2 other = rows[own + r * 8];
        const float peak = fmaxf(top[r], other.x);
        const float mine = exp2_fast(top[r] - peak), theirs = exp2_fast(other.x - peak);
        const float inv = 1.0f / (sum[r] * mine + other.y * theirs);
        bf16* out = a.out + batch * a.out_batch + static_cast<size_t>(row) * a.out_row + head * a.head_dim;
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            const int d = j * 8 + 2 * t;
            const float2 v = *reinterpret_cast<const float2*>(so + (own + r * 8) * kO + d);
            if (d < a.head_dim)
                *reinterpret_cast<uint32_t*>(out + d) = pack_bf16((o[j][2 * r] * mine + v.x * theirs) * inv,
                                                                  (o[j][2 * r + 1] * mine + v.y * theirs) * inv);
        }
    }
}

#define ATTENTION(HD)                                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads) attention_##HD(const __grid_constant__ AttentionArgs a) { \
        attention<HD>(a);                                                                                          \
    }
ATTENTION(32)
ATTENTION(80)
ATTENTION(128)
ATTENTION(256)
