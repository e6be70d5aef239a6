// The decoder on any chip from sm_80 on: matrix instructions of one warp, plain launches, at most 99 KB of shared memory
// a block, and nothing that blocks would have to agree on.
//
// The same weights, activations and epilogues as skinny.cu. A block has 16 weight rows (or 16 pairs of them) and all of
// K, of which its warps take turns; their sums are added in the order of the warps. Attention splits the keys, and a
// second kernel joins the parts in their order. So results are bitwise repeatable on any share of the GPU.
#include "attention.cuh"
#include "skinny.cuh"

// What a lane holds of the piece of K that its warp works on: 32 of K for its weight rows and all tokens.
template <int MT, int NT>
struct Piece {
    uint4 w[MT][2];  // rows g and g + 8 of each 16, k = 8·(lane % 4)..+8
    uint4 x[NT];     // token g of each 8, the same k
};

// NT: token tiles of 8. grid (tiles · kParts). Dynamic shared memory: [kWarps][8·NT][kRow] floats.
template <int NT, int EPI>
__device__ __forceinline__ void product(const SkinnyArgs& a) {
    constexpr int MT = EPI == kResidual ? 1 : 2;       // 16 weight rows, or the two halves of 16 pairs
    constexpr int kWarps = EPI == kResidual ? 16 : 8;  // the K of products that add to the residual is long
    constexpr int kParts = kTile / (16 * MT);          // blocks that share a packed tile
    constexpr int kStride = 8 * NT + 2;                // rows of a panel
    constexpr int kRow = 16 * MT + 4;                  // floats of a row of sums, padded against bank conflicts
    constexpr int kSums = 8 * NT * kRow;
    extern __shared__ __align__(16) float sums[];
    __shared__ float squares[EPI == kResidual ? 1 : kWarps][64];

    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int tile = blockIdx.x / kParts, part = blockIdx.x % kParts;
    const int pieces = a.k / 32;
    const bf16* w = a.w + (static_cast<size_t>(tile) * pieces * 4 + part) * 512;
    const bf16* x = a.x + (t * kStride + g) * 8;

    // All weights of the block are on their way before the first are needed.
    for (int i = tid; i < pieces * MT * 8; i += kWarps * 32)
        prefetch_l2_line(w + (i / (8 * MT)) * 2048 + (i / 8 % MT) * 1024 + i % 8 * 64);

    auto fetch = [&](Piece<MT, NT>& p, int c) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const bf16* from = w + c * 2048 + m * 1024 + lane * 8;
            p.w[m][0] = load_once_16(from);
            p.w[m][1] = load_once_16(from + 256);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) p.x[n] = *reinterpret_cast<const uint4*>(x + (c * 4 * kStride + n * 8) * 8);
    };
    Piece<MT, NT> now, next;
    if (warp < pieces) fetch(now, warp);

    // One item a thread at the end: four columns, or four pairs, of row n. What it needs of others is loaded now.
    const int n = tid / 4, quad = tid % 4;
    const bool valid = n < 8 * NT && n < a.rows;
    const int m = tile * kTile + part * 16 + 4 * quad;  // a column
    const int p = tile * 32 + part * 16 + 4 * quad;     // a pair
    float4 old = make_float4(0, 0, 0, 0), next_scale = old, turn[2];
    if constexpr (EPI == kResidual) {
        if (valid) {
            next_scale = load4(a.scale + m);
            if (!a.init) old = load4(a.h + static_cast<size_t>(n) * a.h_stride + m);
        }
    }
    if constexpr (EPI == kQkv)
        if (valid) load_turn(a, n, p, a.params->prefix, turn);
    if constexpr (EPI != kResidual)
        if (a.squares) {
            float low = 0.0f, high = 0.0f;
            for (int i = warp; i < a.square_tiles; i += kWarps) low += a.squares[i * 64 + lane], high += a.squares[i * 64 + lane + 32];
            squares[warp][lane] = low, squares[warp][lane + 32] = high;
        }

    float acc[MT][NT][4] = {};
#pragma unroll 2
    for (int c = warp; c < pieces; c += kWarps) {
        if (c + kWarps < pieces) fetch(next, c + kWarps);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
                mma_16816(acc[i][j], now.w[i][0].x, now.w[i][1].x, now.w[i][0].y, now.w[i][1].y, now.x[j].x, now.x[j].y);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
                mma_16816(acc[i][j], now.w[i][0].z, now.w[i][1].z, now.w[i][0].w, now.w[i][1].w, now.x[j].z, now.x[j].w);
        now = next;
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float* r = sums + warp * kSums + (8 * j + 2 * t) * kRow + i * 16 + g;
            r[0] = acc[i][j][0];
            r[kRow] = acc[i][j][1];
            r[8] = acc[i][j][2];
            r[kRow + 8] = acc[i][j][3];
        }
    __syncthreads();
    if (n >= 8 * NT) return;  // whole warps

    auto total = [&](int column) {
        const float* r = sums + n * kRow + column;
        float4 v = load4(r);
#pragma unroll
        for (int i = 1; i < kWarps; i++) v = v + load4(r + i * kSums);
        return v;
    };
    if constexpr (EPI == kResidual) {
        float sum = valid ? store_residual(a, n, m, kStride, total(4 * quad), old, next_scale) : 0.0f;
        // Four neighbouring lanes hold the 16 columns of one row.
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (valid && quad == 0) a.squares_out[blockIdx.x * 64 + n] = sum;
    } else {
        if (!valid) return;
        float rinv = 1.0f;
        if (a.squares) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kWarps; i++) sum += squares[i][n];
            rinv = rsqrtf(sum * a.inv_width + kRmsEps);
        }
        float4 lo = total(4 * quad), hi = total(16 + 4 * quad);
        finish_pairs(a, p, rinv, lo, hi);
        if constexpr (EPI == kGeglu)
            store_geglu(a, n, p, kStride, lo, hi);
        else
            store_qkv(a, n, p, lo, hi, turn);
    }
}

#define PRODUCT(NAME, EPI, NT, THREADS)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME##_##NT(const __grid_constant__ SkinnyArgs a) { \
        product<NT, EPI>(a);                                                                                           \
    }
#define FAMILY(NT)                            \
    PRODUCT(portable_qkv, kQkv, NT, 256)      \
    PRODUCT(portable_geglu, kGeglu, NT, 256)  \
    PRODUCT(portable_residual, kResidual, NT, 512)
FAMILY(2)
FAMILY(4)
FAMILY(7)
FAMILY(8)

// All heads share keys and values, so queries are packed: row r is head r % heads of token r / heads.
struct PortableAttentionArgs {
    const bf16* q;              // [rows, head_dim], rotated, packed
    const bf16* suffix_keys;    // [suffix, head_dim]
    const bf16* suffix_values;
    bf16* out;                  // panel of k = heads·head_dim
    float* parts;               // [splits][rows][head_dim]: sums of values, not divided
    float2* tops;               // [splits][rows]: largest score, sum of weights
    const DecodeParams* params;
    float scale;                // 1/√head_dim · log2(e)
    int32_t layer, heads, head_dim, rows, suffix, horizon, stride, splits;
};

constexpr int kKeyTile = 32;

// Keys of one split: whole tiles, the same for both kernels.
__device__ __forceinline__ int split_keys(const PortableAttentionArgs& a) {
    const int total = a.params->prefix + a.suffix;
    return ((total + a.splits - 1) / a.splits + kKeyTile - 1) / kKeyTile * kKeyTile;
}

// grid (splits, row blocks).
template <int HD>
__device__ __forceinline__ void attention_part(const PortableAttentionArgs& a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int prefix = a.params->prefix, total = prefix + a.suffix, per = split_keys(a);
    const int split = blockIdx.x, row0 = blockIdx.y * kRows, first = split * per, count = min(per, total - first);
    if (count <= 0) return;
    const bf16* keys = a.params->keys + a.layer * a.params->layer_stride;
    const bf16* values = a.params->values + a.layer * a.params->layer_stride;
    const bf16* q = a.q + static_cast<size_t>(row0) * a.head_dim;
    auto query = [&](int r) { return q + static_cast<size_t>(r) * a.head_dim; };
    auto key = [&](int i) {
        const int at = first + i;
        return at < prefix ? keys + static_cast<size_t>(at) * a.head_dim : a.suffix_keys + static_cast<size_t>(at - prefix) * a.head_dim;
    };
    auto value = [&](int i) {
        const int at = first + i;
        return at < prefix ? values + static_cast<size_t>(at) * a.head_dim : a.suffix_values + static_cast<size_t>(at - prefix) * a.head_dim;
    };
    // The state row sees the prefix and itself only.
    int seen[2];
#pragma unroll
    for (int r = 0; r < 2; r++)
        seen[r] = (row0 + attended_row(r)) / a.heads == a.horizon ? min(count, prefix + 1 - first) : count;
    Attended<HD> found;
    if (!attend<HD, kKeyTile>(shared, query, a.rows - row0, key, value, count, a.head_dim, a.scale, seen, found)) return;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + attended_row(r);
        if (row >= a.rows) continue;
        const size_t at = static_cast<size_t>(split) * a.rows + row;
        if (t == 0) a.tops[at] = make_float2(found.top[r], found.sum[r]);
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            const int d = j * 8 + 2 * t;
            if (d < a.head_dim)
                *reinterpret_cast<float2*>(a.parts + at * a.head_dim + d) = make_float2(found.o[j][2 * r], found.o[j][2 * r + 1]);
        }
    }
}

#define PART(HD)                                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads) portable_attention_##HD(            \
        const __grid_constant__ PortableAttentionArgs a) {                                     \
        attention_part<HD>(a);                                                                 \
    }
PART(32)
PART(80)
PART(128)
PART(256)

// One thread per four dimensions of a packed row: the parts, in their order.
extern "C" __global__ void __launch_bounds__(kThreads) portable_join(const __grid_constant__ PortableAttentionArgs a) {
    const int quads = a.head_dim / 4, id = blockIdx.x * kThreads + threadIdx.x, row = id / quads, d = id % quads * 4;
    if (row >= a.rows) return;
    const int per = split_keys(a), parts = (a.params->prefix + a.suffix + per - 1) / per;
    float top = -INFINITY;
    for (int c = 0; c < parts; c++) top = fmaxf(top, a.tops[static_cast<size_t>(c) * a.rows + row].x);
    float4 v = make_float4(0, 0, 0, 0);
    float sum = 0.0f;
    for (int c = 0; c < parts; c++) {
        const size_t at = static_cast<size_t>(c) * a.rows + row;
        const float2 part = a.tops[at];
        // Zero for a part of which this row sees no key.
        const float f = exp2_fast(part.x - top);
        sum += f * part.y;
        v = v + load4(a.parts + at * a.head_dim + d) * f;
    }
    *reinterpret_cast<uint2*>(a.out + panel(row / a.heads, row % a.heads * a.head_dim + d, a.stride)) = pack_bf16x4(v * (1.0f / sum));
}
