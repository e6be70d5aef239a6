// Attention of the action expert: a few query rows over prefix and suffix keys with one K/V head.
//
// All heads share keys and values, so queries are packed: row r is head r % heads of token r / heads. A cluster splits
// the keys; each block works on 32 packed rows and its slice of the keys, and sends its partial result to the ranks
// that combine it, in rank order, each for its share of the dimensions.
#include "common.cuh"

constexpr int kRows = 32;
constexpr int kThreads = 256;
constexpr int kRanks = 8;  // blocks the keys are split over

struct DecodeAttentionArgs {
    const bf16* q;              // [rows, head_dim], rotated, packed
    const bf16* suffix_keys;    // [suffix, head_dim]
    const bf16* suffix_values;
    bf16* out;                  // panel of k = heads·head_dim
    const DecodeParams* params;
    const void* next;           // weights to move into L2 for a later kernel, or null
    uint64_t next_bytes;
    float scale;                // 1/√head_dim · log2(e)
    int32_t layer, heads, head_dim, rows, suffix, horizon, stride, tile;  // rows: packed; tile: keys a pass, a multiple of 16
};

template <int HD>
__device__ __forceinline__ void decode_attention(const DecodeAttentionArgs& a) {
    constexpr int kQ = HD + 8;  // elements a row, padded against bank conflicts
    extern __shared__ __align__(128) uint8_t shared[];
    const int kt = a.tile;
    constexpr int kDimsOwn = HD / kRanks;  // dimensions this rank combines
    constexpr int kInbox = kRanks * kRows * kDimsOwn * 4;
    bf16* sq = reinterpret_cast<bf16*>(shared);        // [32][kQ]
    bf16* sk = sq + kRows * kQ;                        // [kt][kQ]; once the scores are there, the inbox
    float* inbox = reinterpret_cast<float*>(sk);       // [kRanks][32][kDimsOwn]
    bf16* sv = sk + max(kt * kQ, kInbox / 2);          // [kt][kQ]
    float* sc = reinterpret_cast<float*>(sv + kt * kQ);  // [32][kt + 4]: scores, then their exponentials in bf16
    const int kp = 2 * (kt + 4);                         // elements a row of those
    bf16* sp = reinterpret_cast<bf16*>(sc);
    __shared__ float row_max[kRows], row_sum[kRows], row_fix[kRows];
    __shared__ float2 inbox_rows[kRanks][kRows];  // maximum and sum
    __shared__ uint64_t arrived[2], received;      // prefix; suffix and queries; the peers' results

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, wm = warp & 1, wn = warp >> 1;
    const int rank = blockIdx.x, row0 = blockIdx.y * kRows;
    const int prefix = a.params->prefix, total = prefix + a.suffix;
    const int per = ((total + kRanks - 1) / kRanks + 15) / 16 * 16;
    const int begin = min(rank * per, total), end = min(begin + per, total);
    const bf16* keys = a.params->keys + a.layer * a.params->layer_stride;
    const bf16* values = a.params->values + a.layer * a.params->layer_stride;

    grid_launch_dependents();
    // Rows as long as the kernel's own go by bulk copies, one a row; shorter ones are padded with zeros.
    const bool whole = a.head_dim == HD;
    if (tid == 0) {
        barrier_init(&arrived[0]), barrier_init(&arrived[1]), barrier_init(&received);
        barrier_expect(&received, kInbox + sizeof(inbox_rows));
    }
    __syncthreads();
    // The prefix is finished before a decode starts; only queries and suffix come from the kernel in front.
    auto load_keys = [&](int from, bool want_suffix) {
        if (whole) {
            const int limit = min(from + kt, end);
            const int first = want_suffix ? max(from, prefix) : from, last = want_suffix ? limit : min(limit, prefix);
            uint64_t* barrier = &arrived[want_suffix];
            if (tid == 0) {
                const int queries = want_suffix && from == begin ? min(kRows, a.rows - row0) : 0;
                barrier_expect(barrier, (max(last - first, 0) * 2 + queries) * HD * 2);
            }
            // All copies count only once they are expected.
            __syncthreads();
            for (int i = tid; i < 2 * (last - first); i += kThreads) {
                const int key = first + i / 2, r = key - from;
                const size_t at = static_cast<size_t>(want_suffix ? key - prefix : key) * HD;
                if (i % 2 == 0)
                    copy_bulk(sk + r * kQ, (want_suffix ? a.suffix_keys : keys) + at, HD * 2, barrier);
                else
                    copy_bulk(sv + r * kQ, (want_suffix ? a.suffix_values : values) + at, HD * 2, barrier);
            }
            if (want_suffix)
                for (int i = tid; i < (from + kt - limit) * (HD / 8); i += kThreads) {
                    const int at = (limit - from + i / (HD / 8)) * kQ + i % (HD / 8) * 8;
                    store_zero_16(sk + at);
                    store_zero_16(sv + at);
                }
            return;
        }
        for (int i = tid; i < kt * (HD / 8); i += kThreads) {
            const int r = i / (HD / 8), d = (i % (HD / 8)) * 8, key = from + r;
            const bool is_suffix = key >= prefix;
            if (is_suffix != want_suffix) continue;
            bf16 *tk = sk + r * kQ + d, *tv = sv + r * kQ + d;
            if (key < end && d < a.head_dim) {
                const size_t at = static_cast<size_t>(is_suffix ? key - prefix : key) * a.head_dim + d;
                copy_async_16(tk, (is_suffix ? a.suffix_keys : keys) + at);
                copy_async_16(tv, (is_suffix ? a.suffix_values : values) + at);
            } else {
                store_zero_16(tk);
                store_zero_16(tv);
            }
        }
    };
    if (begin < end) load_keys(begin, false);
    if (a.next && tid == 0) {
        const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y;
        const uint64_t id = static_cast<uint64_t>(blockIdx.y) * kRanks + rank;
        const uint64_t piece = (a.next_bytes / blocks) & ~static_cast<uint64_t>(127);
        if (piece) prefetch_l2(static_cast<const uint8_t*>(a.next) + id * piece, static_cast<uint32_t>(piece));
    }
    grid_wait();
    if (begin < end)
        for (int i = tid; i < kRows * (HD / 8); i += kThreads) {
            const int r = i / (HD / 8), d = (i % (HD / 8)) * 8;
            const bool valid = row0 + r < a.rows;
            if (whole && valid) continue;
            if (valid && d < a.head_dim)
                copy_async_16(sq + r * kQ + d, a.q + static_cast<size_t>(row0 + r) * a.head_dim + d);
            else
                store_zero_16(sq + r * kQ + d);
        }
    if (tid < kRows) row_max[tid] = -INFINITY, row_sum[tid] = 0.0f;

    constexpr int kDims = HD / 32;  // n8 tiles of the output a warp
    float o[kDims][4] = {};
    const int g = lane / 4, t = lane % 4;
    // Each rank says once that its keys may be overwritten.
    if (begin >= end) cluster_arrive();
    for (int from = begin; from < end; from += kt) {
        if (from != begin) {
            __syncthreads();
            load_keys(from, false);
        }
        load_keys(from, true);
        if (whole) {
            if (from == begin && tid < min(kRows, a.rows - row0))
                copy_bulk(sq + tid * kQ, a.q + static_cast<size_t>(row0 + tid) * HD, HD * 2, &arrived[1]);
            const uint32_t parity = (from - begin) / kt & 1;
            barrier_wait(&arrived[0], parity);
            barrier_wait(&arrived[1], parity);
        } else {
            copy_async_commit();
            copy_async_wait<0>();
        }
        __syncthreads();
        // Scores: 16 query rows and every fourth group of 8 keys a warp.
        {
            float s[4][4] = {};
#pragma unroll 2
            for (int k = 0; k < HD; k += 32) {
                uint32_t a0[4], a1[4];
                ldmatrix_x4(a0, sq + (wm * 16 + lane % 16) * kQ + k + (lane / 16) * 8);
                ldmatrix_x4(a1, sq + (wm * 16 + lane % 16) * kQ + k + 16 + (lane / 16) * 8);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int n = (wn + 4 * j) * 8;
                    if (n < kt) {
                        uint32_t bf[4];  // 32 of k for 8 keys
                        ldmatrix_x4(bf, sk + (n + lane % 8) * kQ + k + (lane / 8) * 8);
                        mma_16816(s[j], a0[0], a0[1], a0[2], a0[3], bf[0], bf[1]);
                        mma_16816(s[j], a1[0], a1[1], a1[2], a1[3], bf[2], bf[3]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int n = (wn + 4 * j) * 8;
                if (n < kt) {
                    float* r = sc + (wm * 16 + g) * (kt + 4) + n + 2 * t;
                    r[0] = s[j][0], r[1] = s[j][1];
                    r[8 * (kt + 4)] = s[j][2], r[8 * (kt + 4) + 1] = s[j][3];
                }
            }
        }
        __syncthreads();
        if (from + kt >= end) cluster_arrive();
        // Softmax: eight lanes a row. The state row sees the prefix and itself only.
        {
            const int r = tid / 8, part = tid % 8;
            const int seen = (row0 + r) / a.heads == a.horizon ? min(end, prefix + 1) : end;
            const float* row = sc + r * (kt + 4);
            float own[16];  // every eighth key
            float top = row_max[r];
            const float before = top;
#pragma unroll
            for (int c = 0; c < 16; c++) {
                const int key = part + 8 * c;
                own[c] = key < kt && from + key < seen ? row[key] * a.scale : -INFINITY;
                top = fmaxf(top, own[c]);
            }
#pragma unroll
            for (int m = 1; m < 8; m <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
            float sum = 0.0f;
            // All lanes of a row have read its scores: the shuffles above wait for them.
#pragma unroll
            for (int c = 0; c < 16; c++) {
                const int key = part + 8 * c;
                if (key >= kt) break;
                const bf16 p = __float2bfloat16(own[c] == -INFINITY ? 0.0f : exp2_fast(own[c] - top));
                sum += __bfloat162float(p);
                sp[r * kp + key] = p;
            }
#pragma unroll
            for (int m = 1; m < 8; m <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
            if (part == 0) {
                const float fix = before == -INFINITY ? 0.0f : exp2_fast(before - top);
                row_fix[r] = fix;
                row_sum[r] = row_sum[r] * fix + sum;
                row_max[r] = top;
            }
        }
        __syncthreads();
        // Weighted values: 16 rows and HD/4 dimensions a warp.
        {
            const float f0 = row_fix[wm * 16 + g], f1 = row_fix[wm * 16 + g + 8];
#pragma unroll
            for (int j = 0; j < kDims; j++) o[j][0] *= f0, o[j][1] *= f0, o[j][2] *= f1, o[j][3] *= f1;
            for (int k = 0; k < kt; k += 16) {
                uint32_t af[4];
                ldmatrix_x4(af, sp + (wm * 16 + lane % 16) * kp + k + (lane / 16) * 8);
#pragma unroll
                for (int j = 0; j < kDims; j++) {
                    uint32_t b0, b1;
                    ldmatrix_x2_trans(b0, b1, sv + (k + lane % 16) * kQ + wn * (HD / 4) + j * 8);
                    mma_16816(o[j], af[0], af[1], af[2], af[3], b0, b1);
                }
            }
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    cluster_wait();
#pragma unroll
    for (int j = 0; j < kDims; j++) {
        const int d = wn * (HD / 4) + j * 8 + 2 * t;
        float* to = inbox + (rank * kRows + wm * 16 + g) * kDimsOwn + d % kDimsOwn;
        const uint32_t remote = remote_address(to, d / kDimsOwn), barrier = remote_address(&received, d / kDimsOwn);
        send(remote, make_float2(o[j][0], o[j][1]), barrier);
        send(remote + 8 * kDimsOwn * 4, make_float2(o[j][2], o[j][3]), barrier);
    }
    send(remote_address(&inbox_rows[rank][lane], warp), make_float2(row_max[lane], row_sum[lane]), remote_address(&received, warp));
    barrier_wait(&received, 0);
    for (int i = tid; i < kRows * (kDimsOwn / 4); i += kThreads) {
        const int r = i / (kDimsOwn / 4), d = (i % (kDimsOwn / 4)) * 4, row = row0 + r, dim = rank * kDimsOwn + d;
        if (row >= a.rows || dim >= a.head_dim) continue;
        float top = -INFINITY;
#pragma unroll
        for (int c = 0; c < kRanks; c++) top = fmaxf(top, inbox_rows[c][r].x);
        float4 v = make_float4(0, 0, 0, 0);
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < kRanks; c++) {
            const float2 part = inbox_rows[c][r];
            const float4 p = *reinterpret_cast<const float4*>(inbox + (c * kRows + r) * kDimsOwn + d);
            const float f = part.x == -INFINITY ? 0.0f : exp2_fast(part.x - top);
            sum += f * part.y;
            v.x += f * p.x, v.y += f * p.y, v.z += f * p.z, v.w += f * p.w;
        }
        const float inv = 1.0f / sum;
        *reinterpret_cast<uint2*>(a.out + panel(row / a.heads, row % a.heads * a.head_dim + dim, a.stride)) =
            pack_bf16x4(make_float4(v.x * inv, v.y * inv, v.z * inv, v.w * inv));
    }
}

#define DECODE_ATTENTION(HD)                                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) decode_attention_##HD(            \
        const __grid_constant__ DecodeAttentionArgs a) {                                        \
        decode_attention<HD>(a);                                                                \
    }
DECODE_ATTENTION(32)
DECODE_ATTENTION(64)
DECODE_ATTENTION(128)
DECODE_ATTENTION(256)
