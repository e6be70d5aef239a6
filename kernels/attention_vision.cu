// Attention over at most 256 keys on sm_90a, for heads of at most 72: SigLIP's.
//
// A group of four warps keeps the scores of its 64 query rows over all keys in registers, so their maxima are known
// before the first weight. Two groups share keys and values: with one a block it takes a third longer, even where all
// those blocks have an SM each. The same rounding points as attention.cu.
//
// Queries, keys and values lie as [5][rows][16 dimensions], rows in the 32-byte swizzle: eight lanes that copy 16 bytes
// each to one row, or one piece of eight rows, meet every bank as seldom as can be. Dimension 72 of the values is one,
// so the product that weighs them sums the weights too; other padding is zero.
#include "wgmma.cuh"

constexpr int kGroup = 128, kThreads = 2 * kGroup;  // threads of one group, and of both
constexpr int kRows = 64, kQueries = 2 * kRows;      // query rows of one group, and of both
constexpr int kKeys = 256;                 // at most
constexpr int kPieces = 9, kRow = 5 * 32;  // pieces of 16 bytes of a row at most, and what it takes in shared memory

struct AttentionArgs {
    const bf16* q;  // as in attention.cu; head_dim is at most 72, keys at most 256
    const bf16* k;
    const bf16* v;
    bf16* out;
    const EncodeParams* params;
    int64_t q_batch, kv_batch, out_batch;
    int32_t q_row, kv_row, kv_head, out_row, rows, keys, head_dim, layer;
    float scale;
    int32_t heads;       // for attention_wide.cu only
    int32_t out_octets;  // of the packed form of tower.cu, token batch·rows + row, rows a multiple of 8; 0: not packed
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Byte offset of piece `c` of row `r` where there are `rows`.
__device__ __forceinline__ uint32_t narrow(uint32_t rows, uint32_t r, uint32_t c) {
    return c / 2 * rows * 32 + r * 32 + ((c ^ r / 4) & 1) * 16;
}

// As tile_descriptor, for the 32-byte swizzle.
__device__ __forceinline__ uint64_t narrow_descriptor(const void* shared, uint32_t lead) {
    return static_cast<uint64_t>((smem_address(shared) & 0x3ffff) >> 4) | static_cast<uint64_t>(lead >> 4) << 16 |
           static_cast<uint64_t>(256 >> 4) << 32 | 3ull << 62;
}

__device__ __forceinline__ void copy_or_zero_16(void* shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(shared)), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}

// Without a branch, so that the loads before it need not wait for each other.
__device__ __forceinline__ void store_if(bool wanted, void* global, const void* shared) {
    const uint4 v = *static_cast<const uint4*>(shared);
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(
                     static_cast<int>(wanted)),
                 "l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// All but the last `kPending` groups of copies are there, for every thread and the matrix unit.
template <int kPending>
__device__ __forceinline__ void arrived() {
    copy_async_wait<kPending>();
    fence_async();
    __syncthreads();
}

// No such value is looked at before this.
template <int N>
__device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#endif

// grid (row blocks, heads, batch).
extern "C" __global__ void __launch_bounds__(kThreads) attention_vision(const __grid_constant__ AttentionArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(256) uint8_t shared[];
    uint8_t* sq = shared;
    uint8_t* sk = sq + kQueries * kRow;
    uint8_t* sv = sk + kKeys * kRow;
    const int tid = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // The compiler shall see that this is the same for a warp: descriptors made of it stay in uniform registers.
    const int group = __shfl_sync(0xffffffffu, tid / kGroup, 0);
    const int row0 = blockIdx.x * kQueries, head = blockIdx.y, batch = blockIdx.z;
    grid_launch_dependents();
#pragma unroll
    for (int n = 0; n < kKeys; n += kThreads) {
        const int r = n + tid;
        store_zero_16(sk + narrow(kKeys, r, kPieces));
        *reinterpret_cast<uint4*>(sv + narrow(kKeys, r, kPieces)) = make_uint4(0x3f80, 0, 0, 0);
    }
    if (tid < kQueries) store_zero_16(sq + narrow(kQueries, tid, kPieces));
    grid_wait();
    const bf16* q = a.q + batch * a.q_batch + head * a.head_dim + static_cast<int64_t>(row0) * a.q_row;
    const bf16 *k, *v;
    if (a.k) {
        k = a.k + batch * a.kv_batch + head * a.kv_head;
        v = a.v + batch * a.kv_batch + head * a.kv_head;
    } else {
        k = a.params->keys + a.layer * a.params->layer_stride;
        v = a.params->values + a.layer * a.params->layer_stride;
    }
    // Eight threads take eight pieces of a row, from the first that begins a sector of 32 bytes; the ninth goes alone.
    const int pieces = static_cast<unsigned>(a.head_dim) / 8, odd = head & pieces & 1, lone = odd ? 0 : 8;
    const int r0 = threadIdx.x / 8, c = threadIdx.x % 8 + odd;
    // The first `count` of the rows at `from`, of which there are `limit`.
    auto load = [&](uint8_t* to, int rows, int count, const bf16* from, int stride, int limit) {
        constexpr int kStep = kThreads / 8;
        const bf16* at = from + static_cast<int64_t>(r0) * stride + c * 8;
        uint8_t* slot = to + narrow(rows, r0, c);
        const int left = c < pieces ? limit - r0 : 0;
#pragma unroll
        for (int n = 0; n < count; n += kStep, at += kStep * stride) copy_or_zero_16(slot + n * 32, at, n < left);
        if (tid < count)
            copy_or_zero_16(to + narrow(rows, tid, lone), from + static_cast<int64_t>(tid) * stride + lone * 8,
                            lone < pieces && tid < limit);
    };
    constexpr int kHalf = kKeys / 2;
    const int64_t later = static_cast<int64_t>(kHalf) * a.kv_row;
    load(sq, kQueries, kQueries, q, a.q_row, a.rows - row0);
    load(sk, kKeys, kHalf, k, a.kv_row, a.keys);
    copy_async_commit();
    load(sk + kHalf * 32, kKeys, kHalf, k + later, a.kv_row, a.keys - kHalf);
    copy_async_commit();
    load(sv, kKeys, kHalf, v, a.kv_row, a.keys);
    copy_async_commit();
    load(sv + kHalf * 32, kKeys, kHalf, v + later, a.kv_row, a.keys - kHalf);
    copy_async_commit();

    // Scores of half the keys each: rows g and g + 8 of every 16, keys 8·j + 2·t and the next.
    float s[2][64], o[40];
    const uint64_t queries = narrow_descriptor(sq + group * kRows * 32, 16), keys = narrow_descriptor(sk, 16);
    auto score = [&](int half) {
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < 5; d++)
            wgmma_64x128(s[half], queries + d * (kQueries * 32 >> 4), keys + (d * kKeys + half * kHalf) * 2, d);
        wgmma_commit();
    };
    arrived<3>();
    score(0);
    arrived<2>();
    score(1);

    float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};  // even and odd keys of both rows
    auto highest = [&](int half) {
        hold(s[half]);
        if (a.keys < kKeys)
#pragma unroll
            for (int i = 0; i < 64; i++)
                if (half * kHalf + i / 4 * 8 + 2 * t + (i & 1) >= a.keys) s[half][i] = -INFINITY;
#pragma unroll
        for (int i = 0; i < 64; i++) top[i % 4] = fmaxf(top[i % 4], s[half][i]);
        hold(top);
    };
    wgmma_wait<1>();
    highest(0);
    wgmma_wait<0>();
    highest(1);
    float scale = a.scale, shift[2];
    asm volatile("" : "+f"(scale));  // otherwise fetched once for every score
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float peak = fmaxf(top[2 * r], top[2 * r + 1]);
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
        shift[r] = -(peak * scale);
    }

    // Values are multiplied as soon as the weights of 32 keys are there.
    uint32_t p[64];
    const uint64_t values = narrow_descriptor(sv, kKeys * 32);
#pragma unroll
    for (int kk = 0; kk < 16; kk += 2) {
#pragma unroll
        for (int i = 4 * kk; i < 4 * kk + 8; i++) {
            const float* x = &s[i / 32][2 * i % 64];
            p[i] = pack_bf16(exp2_fast(fmaf(x[0], scale, shift[i % 2])), exp2_fast(fmaf(x[1], scale, shift[i % 2])));
            asm volatile("" : "+r"(p[i])::"memory");
        }
        if (kk == 0) arrived<1>();
        if (kk == 8) arrived<0>();
        wgmma_fence();
#pragma unroll
        for (int j = kk; j < kk + 2; j++)
            wgmma_64x80(o, p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3], values + j * (16 * 32 >> 4), j);
        wgmma_commit();
    }
    wgmma_wait<0>();
    hold(o);
    // Through the memory of the queries, which nobody reads any more, so that stores are 16 bytes wide.
    uint8_t* own = sq + warp * (16 * kPieces * 16);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float inv = __fdividef(1.0f, __shfl_sync(0xffffffffu, o[4 * kPieces + 2 * r], lane & 28));
#pragma unroll
        for (int j = 0; j < kPieces; j++)
            *reinterpret_cast<uint32_t*>(own + ((g + 8 * r) * kPieces + j) * 16 + 4 * t) =
                pack_bf16(o[4 * j + 2 * r] * inv, o[4 * j + 2 * r + 1] * inv);
    }
    __syncwarp();
    const int first = row0 + warp * 16, r = lane / 8, l = lane % 16;
    auto store = [&](bool wanted, bf16* to, int n, int p) {
        store_if(wanted && first + n < a.rows, to, own + (n * kPieces + p) * 16);
    };
    if (a.out_octets) {
        const uint32_t octet = static_cast<uint32_t>(batch * a.rows + first) / 8;
        auto place = [&](uint32_t n, uint32_t p) {
            const uint32_t column = head * pieces + p, at = column / 8 * a.out_octets + octet + n / 8;
            return a.out + static_cast<int64_t>(at * 64 + n % 8 * 8 + (column ^ n) % 8) * 8;
        };
#pragma unroll
        for (int n = 0; n < 16; n += 4) store(c < pieces, place(r + n, c), r + n, c);
        store(lane < 16 && lone < pieces, place(l, lone), l, lone);
        return;
    }
    bf16* out = a.out + batch * a.out_batch + static_cast<int64_t>(first) * a.out_row + head * a.head_dim;
    bf16* at = out + static_cast<int64_t>(r) * a.out_row + c * 8;
#pragma unroll
    for (int n = 0; n < 16; n += 4, at += 4 * a.out_row) store(c < pieces, at, r + n, c);
    store(lane < 16 && lone < pieces, out + static_cast<int64_t>(l) * a.out_row + lone * 8, l, lone);
#else
    __trap();
#endif
}
