// Attention by online softmax over tiles of keys, on any chip from sm_80 on.
//
// A block has 64 query rows and eight warps: four times 16 rows, and for each two warps that take half of every key
// tile and join at the end.
#pragma once
#include "common.cuh"

constexpr int kRows = 64, kThreads = 256;

// What a lane holds: row r of two is attended_row(r); o[j][2·r] and o[j][2·r + 1] are dimensions 8·j + 2·(lane % 4) and
// the next of it, not yet divided by the sum.
template <int HD>
struct Attended {
    float o[HD / 8][4];
    float top[2], sum[2];  // the largest score, and the sum of the weights 2^(score - top)
};

__device__ __forceinline__ int attended_row(int r) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * r; }

// `rows` queries (64 at most) over `keys` keys, in tiles of KEYS. `query`, `key` and `value` give the address of a row
// of `head_dim` elements; row r of this lane sees its first seen[r] keys. `shared` has room for 64 queries and two
// stages of keys and values, each row HD + 8 elements. True for the threads that hold the result.
template <int HD, int KEYS, class Query, class Key, class Value>
__device__ __forceinline__ bool attend(uint8_t* shared, Query query, int rows, Key key, Value value, int keys, int head_dim,
                                       float scale, const int (&seen)[2], Attended<HD>& a) {
    constexpr int kQ = HD + 8, kHalf = KEYS / 2, kTiles = kHalf / 8;
    bf16* sq = reinterpret_cast<bf16*>(shared);  // [64][kQ]
    bf16* skv = sq + kRows * kQ;                 // [2 stages][K, V][KEYS][kQ]
    const int tid = threadIdx.x, warp = tid / 32 % 4, part = tid / 128, lane = tid % 32, g = lane / 4, t = lane % 4;
    auto load = [&](bf16* to, auto from, int count, int first, int limit) {
        for (int i = tid; i < count * (HD / 8); i += kThreads) {
            const int r = i / (HD / 8), d = (i % (HD / 8)) * 8;
            if (first + r < limit && d < head_dim)
                copy_async_16(to + r * kQ + d, from(first + r) + d);
            else
                store_zero_16(to + r * kQ + d);
        }
    };
    const int tiles = (keys + KEYS - 1) / KEYS;
    load(sq, query, kRows, 0, rows);
    load(skv, key, KEYS, 0, keys);
    load(skv + KEYS * kQ, value, KEYS, 0, keys);
    copy_async_commit();

    auto& o = a.o;
    auto& top = a.top;
    auto& sum = a.sum;
#pragma unroll
    for (int j = 0; j < HD / 8; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.0f;
    top[0] = top[1] = -INFINITY, sum[0] = sum[1] = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
        bf16* sk = skv + (tile & 1) * 2 * KEYS * kQ;
        bf16* sv = sk + KEYS * kQ + part * kHalf * kQ;
        if (tile + 1 < tiles) {
            bf16* nk = skv + ((tile + 1) & 1) * 2 * KEYS * kQ;
            load(nk, key, KEYS, (tile + 1) * KEYS, keys);
            load(nk + KEYS * kQ, value, KEYS, (tile + 1) * KEYS, keys);
        }
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        sk += part * kHalf * kQ;
        float s[kTiles][4] = {};
#pragma unroll
        for (int d = 0; d < HD; d += 16) {
            uint32_t af[4];
            ldmatrix_x4(af, sq + (warp * 16 + lane % 16) * kQ + d + (lane / 16) * 8);
#pragma unroll
            for (int j = 0; j < kTiles; j += 2) {
                uint32_t bf[4];  // keys j·8..+8 and (j+1)·8..+8, each k lower and upper half
                ldmatrix_x4(bf, sk + (j * 8 + (lane / 16) * 8 + lane % 8) * kQ + d + ((lane / 8) % 2) * 8);
                mma_16816(s[j], af[0], af[1], af[2], af[3], bf[0], bf[1]);
                mma_16816(s[j + 1], af[0], af[1], af[2], af[3], bf[2], bf[3]);
            }
        }
        const int before = tile * KEYS + part * kHalf;
        float peak[2] = {top[0], top[1]};
#pragma unroll
        for (int j = 0; j < kTiles; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[j][e] = j * 8 + 2 * t + (e & 1) < seen[e / 2] - before ? s[j][e] * scale : -INFINITY;
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
        uint32_t p[kTiles][2];
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
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
        for (int kk = 0; kk < kTiles / 2; kk++) {
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
    static_assert(kRows * kO * 4 + kRows * 8 <= 4 * KEYS * kQ * 2, "room to hand over");
    float* so = reinterpret_cast<float*>(skv);                         // [64][kO]
    float2* handed = reinterpret_cast<float2*>(so + kRows * kO);  // [64] maximum and sum
    const int own = warp * 16 + g;
    copy_async_wait<0>();
    __syncthreads();
    if (part == 1) {
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            *reinterpret_cast<float2*>(so + own * kO + j * 8 + 2 * t) = make_float2(o[j][0], o[j][1]);
            *reinterpret_cast<float2*>(so + (own + 8) * kO + j * 8 + 2 * t) = make_float2(o[j][2], o[j][3]);
        }
        if (t == 0) handed[own] = make_float2(top[0], sum[0]), handed[own + 8] = make_float2(top[1], sum[1]);
    }
    __syncthreads();
    if (part == 1) return false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float2 other = handed[own + r * 8];
        const float peak = fmaxf(top[r], other.x), low = peak == -INFINITY ? 0.0f : peak;
        const float mine = exp2_fast(top[r] - low), theirs = exp2_fast(other.x - low);
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            const float2 v = *reinterpret_cast<const float2*>(so + (own + r * 8) * kO + j * 8 + 2 * t);
            o[j][2 * r] = o[j][2 * r] * mine + v.x * theirs;
            o[j][2 * r + 1] = o[j][2 * r + 1] * mine + v.y * theirs;
        }
        top[r] = peak;
        sum[r] = sum[r] * mine + other.y * theirs;
    }
    return true;
}
