// Attention of the prefix trunk on sm_90a: heads of 256, 64 query rows a block, matrix instructions on shared memory.
//
// Two groups of four warps take tiles of 64 keys in turn, so that one multiplies while the other is at its softmax;
// they join at the end. The same rounding points as attention.cu.
#include "wgmma.cuh"

constexpr int kGroup = 128;  // threads of one group

struct AttentionArgs {
    const bf16* q;  // as in attention.cu; head_dim is 256
    const bf16* k;
    const bf16* v;
    bf16* out;
    const EncodeParams* params;
    int64_t q_batch, kv_batch, out_batch;
    int32_t q_row, kv_row, kv_head, out_row, rows, keys, head_dim, layer;
    float scale;
};

template <int N>
struct Threads {
    static constexpr int value = N;
};

extern "C" __global__ void __launch_bounds__(2 * kGroup, 1) attention_wide(const __grid_constant__ AttentionArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int kRows = 64, kKeys = 64, kDim = 256;
    constexpr int kTile = 64 * kDim * 2;  // bytes of queries, and of a tile of keys or values
    extern __shared__ uint8_t raw[];
    // Queries, then keys and values of each group.
    uint8_t* shared = raw + (1024 - smem_address(raw) % 1024) % 1024;
    __shared__ float2 rows[kRows];  // maximum and sum of the second group
    const int tid = threadIdx.x, group = tid / kGroup, own = tid % kGroup, warp = own / 32, lane = tid % 32;
    const int g = lane / 4, t = lane % 4;
    uint8_t* sq = shared;
    uint8_t* sk = shared + kTile + group * 2 * kTile;
    uint8_t* sv = sk + kTile;
    const int row0 = blockIdx.x * kRows, head = blockIdx.y, batch = blockIdx.z;
    grid_launch_dependents();
    grid_wait();
    const bf16* q = a.q + batch * a.q_batch + head * kDim;
    const bf16 *k, *v;
    if (a.k) {
        k = a.k + batch * a.kv_batch + head * a.kv_head;
        v = a.v + batch * a.kv_batch + head * a.kv_head;
    } else {
        k = a.params->keys + a.layer * a.params->layer_stride;
        v = a.params->values + a.layer * a.params->layer_stride;
    }
    // 64 rows of 512 bytes by `THREADS` threads: a thread has one column and every (THREADS/32)th row.
    auto load = [&](auto threads, uint8_t* to, const bf16* from, int first, int limit, int stride) {
        constexpr int kStep = decltype(threads)::value / 32;
        const int who = tid % (kStep * 32), r0 = who / 32, c = who % 32;
        const bf16* at = from + static_cast<size_t>(first + r0) * stride + c * 8;
        const int64_t step = static_cast<int64_t>(kStep) * stride;
        const int left = limit - first - r0;
#pragma unroll
        for (int n = 0; n < 64 / kStep; n++) {
            uint8_t* slot = to + swizzled(64, r0 + n * kStep, c);
            if (n * kStep < left)
                copy_async_16(slot, at + n * step);
            else
                store_zero_16(slot);
        }
    };
    const Threads<kGroup> group_threads;
    const Threads<2 * kGroup> all_threads;
    auto group_sync = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory"); };
    const int tiles = (a.keys + kKeys - 1) / kKeys;
    load(all_threads, sq, q, row0, a.rows, a.q_row);
    if (group < tiles) load(group_threads, sk, k, group * kKeys, a.keys, a.kv_row);
    copy_async_commit();
    if (group < tiles) load(group_threads, sv, v, group * kKeys, a.keys, a.kv_row);
    copy_async_commit();
    copy_async_wait<1>();
    fence_async();
    __syncthreads();

    float o[128];
#pragma unroll
    for (int i = 0; i < 128; i++) o[i] = 0.0f;
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    for (int tile = group; tile < tiles; tile += 2) {
        if (tile != group) {
            copy_async_wait<1>();
            fence_async();
            group_sync();
        }
        float s[32];
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < kDim; d += 16) {
            const int at = d / 64 * (64 * 128) + d % 64 * 2;
            wgmma_64x64(s, tile_descriptor(sq + at, 16, 1024), tile_descriptor(sk + at, 16, 1024), d > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        group_sync();
        if (tile + 2 < tiles) load(group_threads, sk, k, (tile + 2) * kKeys, a.keys, a.kv_row);
        copy_async_commit();

        const int left = a.keys - tile * kKeys;
        float peak[2] = {top[0], top[1]};
#pragma unroll
        for (int i = 0; i < 32; i++) {
            s[i] = i / 4 * 8 + 2 * t + (i & 1) < left ? s[i] * a.scale : -INFINITY;
            peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], s[i]);
        }
        float fix[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 1));
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], 2));
            // A tile has at least one key, so the maximum is finite from here on.
            fix[r] = exp2_fast(top[r] - peak[r]);
            top[r] = peak[r];
        }
        uint32_t p[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int r = i % 2;
            p[i] = pack_bf16(exp2_fast(s[2 * i] - peak[r]), exp2_fast(s[2 * i + 1] - peak[r]));
            const float2 back = unpack_bf16(p[i]);
            added[r] += back.x + back.y;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            added[r] += __shfl_xor_sync(0xffffffffu, added[r], 1);
            added[r] += __shfl_xor_sync(0xffffffffu, added[r], 2);
            sum[r] = sum[r] * fix[r] + added[r];
        }
        // Most tiles after the first raise no maximum.
        if (__any_sync(0xffffffffu, fix[0] != 1.0f || fix[1] != 1.0f))
#pragma unroll
            for (int i = 0; i < 128; i++) o[i] *= fix[i / 2 % 2];
        copy_async_wait<1>();
        fence_async();
        group_sync();
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < 4; kk++)
            wgmma_64x256(o, p[4 * kk], p[4 * kk + 1], p[4 * kk + 2], p[4 * kk + 3],
                         tile_descriptor(sv + kk * 16 * 128, 64 * 128, 1024));
        wgmma_commit();
        wgmma_wait<0>();
        group_sync();
        if (tile + 2 < tiles) load(group_threads, sv, v, (tile + 2) * kKeys, a.keys, a.kv_row);
        copy_async_commit();
    }
    copy_async_wait<0>();
    // The second group hands over through the memory of its keys and values, thread to thread.
    float* handed = reinterpret_cast<float*>(shared + 3 * kTile);
    const int r0 = warp * 16 + g;
    if (group == 1) {
#pragma unroll
        for (int i = 0; i < 128; i++) handed[i * kGroup + own] = o[i];
        if (t == 0) rows[r0] = make_float2(top[0], sum[0]), rows[r0 + 8] = make_float2(top[1], sum[1]);
    }
    __syncthreads();
    if (group == 1) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + r0 + r * 8;
        if (row >= a.rows) continue;
        const float2 other = rows[r0 + r * 8];
        const float peak = fmaxf(top[r], other.x);
        const float mine = exp2_fast(top[r] - peak), theirs = exp2_fast(other.x - peak);
        const float inv = 1.0f / (sum[r] * mine + other.y * theirs);
        bf16* out = a.out + batch * a.out_batch + static_cast<size_t>(row) * a.out_row + head * kDim;
#pragma unroll
        for (int j = 0; j < 32; j++) {
            const int i = 4 * j + 2 * r;
            *reinterpret_cast<uint32_t*>(out + j * 8 + 2 * t) =
                pack_bf16((o[i] * mine + handed[i * kGroup + own] * theirs) * inv,
                          (o[i + 1] * mine + handed[(i + 1) * kGroup + own] * theirs) * inv);
        }
    }
#else
    __trap();
#endif
}
