// Once per checkpoint: tensors to the layouts the other kernels want, and weights drawn on the device for benchmarks.
#include "common.cuh"

constexpr int kThreads = 256;

__device__ __forceinline__ float read_as(const void* p, size_t i, int type) {
    if (type == 0) return __bfloat162float(static_cast<const bf16*>(p)[i]);
    if (type == 1) return static_cast<const float*>(p)[i];
    return __half2float(static_cast<const __half*>(p)[i]);
}

struct CopyArgs {
    const void* from;  // [rows, cols]
    void* to;
    int64_t rows, cols, stride;  // stride: elements a row of `to`
    int32_t type, to_f32, transpose;  // type: 0 bf16, 1 f32, 2 f16; transpose: to[c·stride + r]
    float add, factor;
};

// to = (from + add)·factor as bf16 or float32.
extern "C" __global__ void __launch_bounds__(kThreads) load_copy(const __grid_constant__ CopyArgs a) {
    const int64_t total = a.rows * a.cols;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * kThreads) {
        const int64_t r = i / a.cols, c = i % a.cols, at = a.transpose ? c * a.stride + r : r * a.stride + c;
        const float v = (read_as(a.from, i, a.type) + a.add) * a.factor;
        if (a.to_f32)
            static_cast<float*>(a.to)[at] = v;
        else
            static_cast<bf16*>(a.to)[at] = __float2bfloat16(v);
    }
}

// Where row r of a matrix goes in packed order: rows that are combined after the product lie `half` apart.
// order 0: as it is; 1: pairs of the rotation, starting at head `first`; 2: gate rows; 3: up rows.
__device__ __forceinline__ int64_t packed_row(int64_t r, int order, int first, int head_dim, int half) {
    if (order == 0) return r;
    int64_t pair = r, second = order == 3;
    if (order == 1) {
        const int pairs = head_dim / 2;
        const int64_t d = r % head_dim;
        pair = (first + r / head_dim) * pairs + d % pairs, second = d >= pairs;
    }
    return pair / half * (2 * half) + pair % half + second * half;
}

// Layouts of packed weights: for skinny.cu [tiles][k/32][4][2][32][8], for persistent.cu [k/128][rows/8][16][8][8], for
// geglu_wide.cu and tower.cu as is said there.
enum Layout { kFragments = 0, kTiles = 1, kWide = 2, kTower = 3 };

// Where row r of a gate or up projection goes for geglu_wide.cu.
__device__ __forceinline__ int64_t wide_row(int64_t r, int order) {
    const int64_t in = r % 128;
    return r / 128 * 256 + in / 64 * 128 + in % 4 / 2 * 64 + in % 64 / 16 * 16 + (order == 3) * 8 + in % 16 / 4 * 2 + in % 2;
}

// Where row r of a matrix goes for tower.cu: two neighbours lie 8 apart.
__device__ __forceinline__ int64_t tower_row(int64_t r) { return r / 16 * 16 + r % 2 * 8 + r % 16 / 2; }

// The same where it is rotated: a tile is 32 pairs of a head, the halves of a pair lie 8 apart.
__device__ __forceinline__ int64_t rotated_row(int64_t r, int head_dim) {
    const int64_t pairs = head_dim / 2, d = r % head_dim, pair = d % pairs;
    return r - d + pair / 8 * 16 + d / pairs * 8 + pair % 8;
}

__device__ __forceinline__ int half_of(int layout) { return layout == kFragments ? 32 : 1; }

// Offset of (row, k) of `rows` packed rows.
__device__ __forceinline__ int64_t packed_at(int64_t row, int64_t k, int64_t padded_k, int64_t rows, int layout) {
    if (layout == kWide || layout == kTower) {
        const int64_t tall = layout == kWide ? 256 : 64;
        return (row / tall * (padded_k / 64) + k / 64) * (tall * 64) + row % tall * 64 + (k % 64 / 8 ^ row % 8) * 8 + k % 8;
    }
    if (layout == kTiles) return (k / 128 * (rows / 8) + row / 8) * 1024 + k % 128 / 8 * 64 + row % 8 * 8 + k % 8;
    const int64_t tile = row / 64, r = row % 64;
    const int64_t lane = (r % 8) * 4 + (k % 32) / 8;
    return (((tile * (padded_k / 32) + k / 32) * 4 + r / 16) * 2 + (r % 16) / 8) * 256 + lane * 8 + k % 8;
}

struct PackArgs {
    const void* from;  // [rows, cols]
    bf16* to;
    int64_t rows, cols, padded_k, packed_rows;
    int32_t type, order, first, head_dim, layout;
};

extern "C" __global__ void __launch_bounds__(kThreads) load_pack(const __grid_constant__ PackArgs a) {
    const int64_t total = a.rows * a.cols;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * kThreads) {
        const int64_t r = i / a.cols, k = i % a.cols;
        const int64_t row = a.layout == kWide    ? wide_row(r, a.order)
                            : a.layout == kTower ? (a.order == 1 ? rotated_row(r, a.head_dim) : tower_row(r))
                                                 : packed_row(r, a.order, a.first, a.head_dim, half_of(a.layout));
        a.to[packed_at(row, k, a.padded_k, a.packed_rows, a.layout)] = __float2bfloat16(read_as(a.from, i, a.type));
    }
}

struct ProductArgs {
    const void* w;      // [rows, k] plain, or packed bf16 when `padded_k` is not 0
    const float* x;     // [count, x_stride]
    const float* bias;  // [rows] or null
    float* y;           // [count, y_stride]
    int64_t rows, k, padded_k, x_stride, y_stride;
    int32_t type, count, silu, layout;
    float add;          // added to every result: the 1 of 1 + scale
};

// y = x·wᵀ + bias in float32, one warp per (row, vector): the tables of the time branch.
extern "C" __global__ void __launch_bounds__(kThreads) load_product(const __grid_constant__ ProductArgs a) {
    const int64_t id = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / 32;
    if (id >= a.rows * a.count) return;
    const int64_t row = id / a.count, n = id % a.count, lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int64_t k = lane; k < a.k; k += 32)
        sum += read_as(a.w, a.padded_k ? packed_at(row, k, a.padded_k, a.rows, a.layout) : row * a.k + k, a.type) * a.x[n * a.x_stride + k];
    sum = warp_sum(sum);
    if (lane == 0) {
        sum += (a.bias ? a.bias[row] : 0.0f) + a.add;
        a.y[n * a.y_stride + row] = a.silu ? silu(sum) : sum;
    }
}

struct RandomArgs {
    void* to;
    int64_t count;
    uint64_t seed;
    float deviation;
    int32_t to_f32;
};

// Approximately normal numbers (sum of four uniforms) from a counter-based hash: the same for the same seed.
extern "C" __global__ void __launch_bounds__(kThreads) load_random(const __grid_constant__ RandomArgs a) {
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < a.count; i += static_cast<int64_t>(gridDim.x) * kThreads) {
        uint64_t z = a.seed + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        const float u = (static_cast<float>(z & 0xffff) + static_cast<float>((z >> 16) & 0xffff) +
                         static_cast<float>((z >> 32) & 0xffff) + static_cast<float>(z >> 48)) / 65536.0f - 2.0f;
        const float v = u * 1.7320508f * a.deviation;  // four uniforms have variance 1/3
        if (a.to_f32)
            static_cast<float*>(a.to)[i] = v;
        else
            static_cast<bf16*>(a.to)[i] = __float2bfloat16(v);
    }
}

struct DifferArgs {
    const uint32_t *a, *b;
    uint32_t* differ;  // in host memory
    int64_t count;
};

// Sets `differ` to 1 where not every word is the same.
extern "C" __global__ void __launch_bounds__(kThreads) load_differ(const __grid_constant__ DifferArgs a) {
    bool differ = false;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < a.count; i += static_cast<int64_t>(gridDim.x) * kThreads)
        differ |= a.a[i] != a.b[i];
    if (differ) *a.differ = 1;
}
