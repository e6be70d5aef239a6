// Attention of the prefix trunk on sm_90a: heads of 256 that share one head of keys and values.
//
// Rows of all heads are one list that is cut into N at a time; a cluster of two blocks has N of them. Keys are the rows
// of the matrix instructions and queries their columns: columns come in eights, so the list is cut into about as many
// pieces as there are pairs of SMs. A pass takes up to nine tiles of 64 keys: even ones go to the first block, odd ones
// to the second, and in a block to two groups of four warps in turn. Scores stay in registers until both blocks know
// the maxima. Then the blocks exchange weights in bf16, half the bytes of sums, and each multiplies all of them by its half
// of the values' columns, a group by a quarter: nothing is left to join.
//
// What is worked out for a row depends on neither N nor the other rows. The same rounding points as attention.cu.
#include "wgmma.cuh"

constexpr int kGroup = 128;  // threads of one group
constexpr int kDim = 256;
constexpr int kMost = 9;  // tiles of a pass

struct AttentionArgs {
    const bf16* q;  // as in attention.cu; head_dim is 256
    const bf16* k;
    const bf16* v;
    bf16* out;
    const EncodeParams* params;
    int64_t q_batch, kv_batch, out_batch;
    int32_t q_row, kv_row, kv_head, out_row, rows, keys, head_dim, layer;  // kv_head is 0
    float scale;
    int32_t heads;
    int32_t out_octets;  // of the packed form of tower.cu, one batch only; 0: rows
};

template <int N>
struct Number {
    static constexpr int value = N;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

WGMMA(wgmma, 40, 20, 20, 21, 22, 0)
WGMMA(wgmma, 72, 36, 36, 37, 38, 0)
WGMMA(wgmma, 96, 48, 48, 49, 50, 0)
WGMMA(wgmma, 104, 52, 52, 53, 54, 0)
WGMMA(wgmma_rows, 40, 20, 20, 21, 22, 1)
WGMMA(wgmma_rows, 72, 36, 36, 37, 38, 1)
WGMMA(wgmma_rows, 96, 48, 48, 49, 50, 1)
WGMMA(wgmma_rows, 104, 52, 52, 53, 54, 1)

// Sums of a matrix instruction are not looked at before this.
template <int M>
__device__ __forceinline__ void settle(float (&d)[M]) {
#pragma unroll
    for (int i = 0; i < M; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// A barrier over the cluster that orders data too.
__device__ __forceinline__ void cluster_release() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_acquire() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores where the other block of the cluster sees it behind the next barrier.
__device__ __forceinline__ void store_remote(uint32_t remote, float2 v) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote), "f"(v.x), "f"(v.y) : "memory");
}

// Moves `bytes` to another block; its `barrier`, a remote address too, counts them.
__device__ __forceinline__ void send_bulk(uint32_t remote, const void* shared, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     remote),
                 "r"(smem_address(shared)), "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ float2 larger(float2 a, float2 b) { return make_float2(fmaxf(a.x, b.x), fmaxf(a.y, b.y)); }

// Zeros where `wanted` is false; nothing is read then.
__device__ __forceinline__ void copy_or_zero_16(uint32_t shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}

// Walks the list of rows, `step` at a time.
struct Walk {
    int heads, token, head, tokens, rest;
    __device__ __forceinline__ Walk(int heads, int row, int step)
        : heads(heads), token(row / heads), head(row % heads), tokens(step / heads), rest(step % heads) {}
    __device__ __forceinline__ void next() {
        token += tokens, head += rest;
        if (head >= heads) head -= heads, token++;
    }
    __device__ __forceinline__ size_t offset(int stride) const {
        return static_cast<size_t>(token) * stride + head * kDim;
    }
};

// Where things lie in shared memory. At first: a tile of keys of each group, up to three more, queries. Then: four
// tiles of values of each group over its keys, weights over what was behind, and behind them kLate more tiles of values of each group.
template <int N>
struct Wide {
    static constexpr int kKeys = 64 * kDim * 2, kValues = 64 * 64 * 2, kWeights = N * 128;  // bytes of a tile
    static constexpr int kWeightsAt = 2 * kKeys, kLateAt = kWeightsAt + kMost * kWeights;
    static constexpr int kQueriesAt = kWeightsAt + 3 * kKeys;
    static constexpr int kLate = N > 96 ? 2 : N > 72 ? 3 : 4, kSlots = 4 + kLate;
    static constexpr int kLateEnd = kLateAt + 2 * kLate * kValues, kQueriesEnd = kQueriesAt + N * kDim * 2;
    static constexpr int kEnd = kLateEnd > kQueriesEnd ? kLateEnd : kQueriesEnd;
    static_assert(N % 8 == 0 && kEnd + 1024 + 12 * N * 4 + 16 <= 227 * 1024, "shared memory");
};

#endif

template <int N>
__device__ __forceinline__ void attention_wide(const AttentionArgs& a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef Wide<N> W;
    extern __shared__ uint8_t raw[];
    // By pairs of rows: what the warps found, maxima of both blocks, the other's sums, what earlier passes shrink by.
    __shared__ float2 part[8][N / 2], mine[N / 2], theirs[N / 2], sums[N / 2], shrink[N / 2];
    __shared__ uint64_t arrived;
    uint8_t* shared = raw + (1024 - smem_address(raw) % 1024) % 1024;
    const int tid = threadIdx.x, own = tid % kGroup, lane = tid % 32, g = lane / 4, t = lane % 4;
    // The same for a warp, which the compiler shall see: descriptors made of it stay in uniform registers.
    const int warps = __shfl_sync(0xffffffffu, tid / 32, 0), group = warps / 4, warp = warps % 4;
    const int rank = cluster_rank(), row0 = blockIdx.x / 2 * N, batch = blockIdx.z, total = a.rows * a.heads;
    uint8_t *keys = shared + group * W::kKeys, *weights = shared + W::kWeightsAt, *queries = shared + W::kQueriesAt;
    uint8_t* late = shared + W::kLateAt + group * W::kLate * W::kValues;
    grid_launch_dependents();
    if (tid == 0) barrier_init(&arrived);
    __syncwarp();
    cluster_release();
    grid_wait();
    const bf16* q = a.q + batch * a.q_batch;
    const int64_t layer = a.k ? 0 : a.layer * a.params->layer_stride;
    const bf16* k = a.k ? a.k + batch * a.kv_batch : a.params->keys + layer;
    const bf16* v = (a.k ? a.v + batch * a.kv_batch : a.params->values + layer) + rank * 128 + group * 64;

    auto group_sync = [&] { asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kGroup) : "memory"); };
    auto load_queries = [&] {
        Walk at(a.heads, row0 + tid / 32, 8);
        uint32_t slot = smem_address(queries) + swizzled(N, tid / 32, lane);
#pragma unroll 1
        for (int r = tid / 32; r < N; r += 8, slot += 8 * 128, at.next())
            copy_or_zero_16(slot, q + at.offset(a.q_row) + lane * 8, row0 + r < total);
    };
    // Rows of 16·kPieces bytes of 64 keys by one group: a thread has one piece of every so many rows.
    auto load = [&](auto pieces, uint8_t* to, const bf16* from, int tile) {
        constexpr int kPieces = decltype(pieces)::value, kStep = kGroup / kPieces;
        int who = own;
        asm volatile("" : "+r"(who));  // addresses are worked out here, not kept in registers
        const int r0 = who / kPieces, c = who % kPieces, left = a.keys - tile * 64 - r0;
        const bf16* at = from + static_cast<size_t>(tile * 64 + r0) * a.kv_row + c * 8;
        const int64_t step = static_cast<int64_t>(kStep) * a.kv_row;
        const uint32_t slot = smem_address(to) + swizzled(64, r0, c);
#pragma unroll
        for (int n = 0; n < 64 / kStep; n++, at += step)
            copy_or_zero_16((slot ^ n * kStep % 8 * 16) + n * kStep * 128, at, n * kStep < left);
    };
    const uint64_t key_rows = tile_descriptor(keys, 16, 1024), query_rows = tile_descriptor(queries, 16, 1024);
    const uint64_t weight_rows = tile_descriptor(weights, 16, 1024);
    // Scores of a tile of keys that lies `at` bytes behind the group's first.
    auto multiply = [&](float (&s)[N / 2], int at) {
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < kDim; d += 16)
            wgmma(s, with_upper(static_cast<uint32_t>(key_rows) + (at + d / 64 * 8192 + d % 64 * 2) / 16, key_rows),
                  with_upper(static_cast<uint32_t>(query_rows) + (d / 64 * (N * 128) + d % 64 * 2) / 16, query_rows),
                  d > 0);
        wgmma_commit();
    };
    // A lane's place in a tile [N][64] for store_transposed: rows lane % 8, pieces 2·warp and the next of it.
    const int place = lane % 8 * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;

    const int tiles = (a.keys + 63) / 64;
    // A group holds the scores of kHeld tiles: of three where there is one pass, of two beside sums of passes before.
    auto attend = [&](auto held) {
        constexpr int kHeld = decltype(held)::value;
        const int passes = kHeld == 3 ? 1 : (tiles + 7) / 8, most = (tiles + passes - 1) / passes;
        float o[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) o[i] = 0.0f;
        // The first threads keep two rows each.
        const bool keeper = tid < N / 2;
        float2 top = make_float2(-INFINITY, -INFINITY), sum = make_float2(0.0f, 0.0f);
        for (int pass = 0; pass < passes; pass++) {
            const int first = pass * most, n = min(most, tiles - first);
            // Tiles of this block, and of this group: every fourth one from `start` on.
            const int owned = (n + 1 - rank) / 2, start = 2 * group + rank, count = (n - start + 3) / 4;
            // Tile i as this block takes them to multiply weights: its own ones before the other's.
            auto turn = [&](int i) { return first + (i < owned ? 2 * i + rank : 2 * (i - owned) + 1 - rank); };
            const Number<32> key_pieces;
            const Number<8> value_pieces;
            auto load_values = [&](int i, uint8_t* to) {
                if (i < n) load(value_pieces, to, v, turn(i));
                copy_async_commit();
            };
            if (tid == 0) barrier_expect(&arrived, (n - owned) * W::kWeights + N * 4);
            load_queries();
            if (count > 0) load(key_pieces, keys, k, first + start);
            copy_async_commit();
            if (count > 1) load(key_pieces, weights + group * W::kKeys, k, first + start + 4);
            copy_async_commit();
            copy_async_wait<1>();
            fence_async();
            __syncthreads();

            float s[kHeld][N / 2];
            if (count > 0) multiply(s[0], 0);
            if (kHeld > 2 && count > 2) load(key_pieces, weights + 2 * W::kKeys, k, first + start + 8);
            copy_async_commit();
            wgmma_wait<0>();
            group_sync();
#pragma unroll 1
            for (int i = 0; i < 4; i++) load_values(i, keys + i * W::kValues);
            if (count > 1) {
                copy_async_wait<5>();
                fence_async();
                group_sync();
                multiply(s[1], W::kWeightsAt);  // as far behind the group's first for both groups
            }
            if constexpr (kHeld > 2)
                if (count > 2) {
                    copy_async_wait<4>();
                    fence_async();
                    group_sync();
                    multiply(s[2], W::kWeightsAt + 2 * W::kKeys);
                }
            wgmma_wait<0>();

            float peak[N / 4];
#pragma unroll
            for (int c = 0; c < N / 4; c++) peak[c] = -INFINITY;
#pragma unroll
            for (int j = 0; j < kHeld; j++) {
                if (j >= count) continue;
                settle(s[j]);
                const int left = a.keys - (first + start + 4 * j) * 64 - warp * 16 - g;
#pragma unroll
                for (int i = 0; i < N / 2; i++) {
                    s[j][i] = (i & 2) * 4 < left ? s[j][i] * a.scale : -INFINITY;
                    peak[i / 4 * 2 + i % 2] = fmaxf(peak[i / 4 * 2 + i % 2], s[j][i]);
                }
            }
            // Over the eight lanes that have a row's keys, then to the row's place.
            auto gather = [&](float (&x)[N / 4], auto join) {
#pragma unroll
                for (int c = 0; c < N / 4; c++)
#pragma unroll
                    for (int m = 4; m < 32; m *= 2) x[c] = join(x[c], __shfl_xor_sync(0xffffffffu, x[c], m));
                if (g == 0)
#pragma unroll
                    for (int c = 0; c < N / 8; c++) part[warps][c * 4 + t] = make_float2(x[2 * c], x[2 * c + 1]);
            };
            gather(peak, [](float x, float y) { return fmaxf(x, y); });
            __syncthreads();
            // Every matrix of this block has been read: values may lie over queries.
            if (pass == 0) cluster_acquire();
            if (keeper) {
                float2 m = top;
#pragma unroll
                for (int w = 0; w < 8; w++) m = larger(m, part[w][tid]);
                mine[tid] = m;
                store_remote(remote_address(&theirs[tid], rank ^ 1), m);
            }
            __syncwarp();
            cluster_release();
#pragma unroll 1
            for (int i = 4; i < W::kSlots; i++) load_values(i, late + (i - 4) * W::kValues);
            cluster_acquire();
            // A pass has at least one key, so the maximum is finite from here on.
            float2 fix = make_float2(0.0f, 0.0f);
            if (keeper) {
                const float2 m = larger(mine[tid], theirs[tid]);
                fix = make_float2(exp2_fast(top.x - m.x), exp2_fast(top.y - m.y));
                shrink[tid] = fix;
                top = m;
            }
            float added[N / 4];
#pragma unroll
            for (int c = 0; c < N / 8; c++) {
                const float2 m = larger(mine[c * 4 + t], theirs[c * 4 + t]);
                peak[2 * c] = m.x, peak[2 * c + 1] = m.y;
                added[2 * c] = added[2 * c + 1] = 0.0f;
            }
#pragma unroll
            for (int j = 0; j < kHeld; j++) {
                if (j >= count) continue;
                uint8_t* to = weights + (rank * 5 + 2 * j + group) * W::kWeights + place;
#pragma unroll
                for (int c = 0; c < N / 8; c++) {
                    const float m0 = peak[2 * c], m1 = peak[2 * c + 1];
                    const uint32_t low = pack_bf16(exp2_fast(s[j][4 * c] - m0), exp2_fast(s[j][4 * c + 1] - m1));
                    const uint32_t high = pack_bf16(exp2_fast(s[j][4 * c + 2] - m0), exp2_fast(s[j][4 * c + 3] - m1));
                    const float2 x = unpack_bf16(low), y = unpack_bf16(high);
                    added[2 * c] += x.x + y.x, added[2 * c + 1] += x.y + y.y;
                    store_transposed(to + c * 1024, low, high);
                }
            }
            gather(added, [](float x, float y) { return x + y; });
            fence_async();
            __syncthreads();
            const uint32_t there = remote_address(&arrived, rank ^ 1);
            float2 total_added = make_float2(0.0f, 0.0f);
            if (tid == kGroup && owned > 0) {
                uint8_t* from = weights + rank * 5 * W::kWeights;
                send_bulk(remote_address(from, rank ^ 1), from, owned * W::kWeights, there);
            }
            if (keeper) {
#pragma unroll
                for (int w = 0; w < 8; w++) total_added.x += part[w][tid].x, total_added.y += part[w][tid].y;
                send(remote_address(&sums[tid], rank ^ 1), total_added, there);
            }
            __syncwarp();
            if (pass > 0)
#pragma unroll
                for (int c = 0; c < N / 8; c++) {
                    const float2 f = shrink[c * 4 + t];
                    o[4 * c] *= f.x, o[4 * c + 1] *= f.y, o[4 * c + 2] *= f.x, o[4 * c + 3] *= f.y;
                }
            auto slot = [&](int i) { return i < 4 ? keys + i * W::kValues : late + (i - 4) * W::kValues; };
#pragma unroll 1
            for (int i = 0; i < n; i++) {
                if (i == owned) barrier_wait(&arrived, pass & 1);
                // A group of copies a turn; those of tiles that take the place of others are one turn late.
                if (i < W::kSlots)
                    copy_async_wait<W::kSlots - 1>();
                else
                    copy_async_wait<W::kSlots - 2>();
                fence_async();
                group_sync();
                wgmma_fence();
                const uint64_t columns = tile_descriptor(slot(i < W::kSlots ? i : i - W::kSlots), 8192, 1024);
                const int at = i < owned ? rank * 5 + i : (1 - rank) * 5 + i - owned;
                const uint32_t rows = static_cast<uint32_t>(weight_rows) + at * (W::kWeights / 16);
#pragma unroll
                for (int kk = 0; kk < 4; kk++)
                    wgmma_rows(o, with_upper(static_cast<uint32_t>(columns) + kk * (2048 / 16), columns),
                               with_upper(rows + kk * 2, weight_rows), 1);
                wgmma_commit();
                if (i > 0 && i - 1 + W::kSlots < n) {
                    wgmma_wait<1>();
                    group_sync();
                    load(value_pieces, slot(i - 1), v, turn(i - 1 + W::kSlots));
                }
                copy_async_commit();
            }
            wgmma_wait<0>();
            settle(o);
            barrier_wait(&arrived, pass & 1);
            if (keeper) {
                const float2 other = sums[tid];
                sum.x = sum.x * fix.x + (total_added.x + other.x), sum.y = sum.y * fix.y + (total_added.y + other.y);
            }
            __syncwarp();
            // What came from the other block and what it has of this one's has been read.
            cluster_release();
            if (pass + 1 < passes) cluster_acquire();
        }
        if (keeper) mine[tid] = make_float2(1.0f / sum.x, 1.0f / sum.y);
        __syncthreads();
        // By way of the group's own values, so that eight lanes store 128 bytes of a row.
#pragma unroll
        for (int c = 0; c < N / 8; c++) {
            const float2 inv = mine[c * 4 + t];
            store_transposed(keys + place + c * 1024, pack_bf16(o[4 * c] * inv.x, o[4 * c + 1] * inv.y),
                             pack_bf16(o[4 * c + 2] * inv.x, o[4 * c + 3] * inv.y));
        }
        group_sync();
        Walk at(a.heads, row0 + own / 8, 16);
        const int piece = rank * 128 + group * 64 + own % 8 * 8;
#pragma unroll 1
        for (int r = own / 8; r < N; r += 16, at.next()) {
            bf16* out = a.out + batch * a.out_batch + at.offset(a.out_row) + piece;
            if (a.out_octets) out = a.out + ((static_cast<size_t>(at.head * 4 + rank * 2 + group) * a.out_octets + at.token / 8) * 8 + at.token % 8) * 64 + ((own ^ at.token) % 8) * 8;
            if (row0 + r < total) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(keys + swizzled(N, r, own % 8));
        }
    };
    if (tiles <= kMost)
        attend(Number<3>{});
    else
        attend(Number<2>{});
    // No block leaves while the other still reads from it.
    cluster_acquire();
#else
    __trap();
#endif
}

#define ATTENTION_WIDE(N)                                             \
    extern "C" __global__ void __launch_bounds__(2 * kGroup, 1)       \
        attention_wide_##N(const __grid_constant__ AttentionArgs a) { \
        attention_wide<N>(a);                                         \
    }
ATTENTION_WIDE(40)
ATTENTION_WIDE(72)
ATTENTION_WIDE(96)
ATTENTION_WIDE(104)
