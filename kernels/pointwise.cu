// The encoder's work between matrix products: norms, rotation into the cache, gated GELU.
#include "common.cuh"

constexpr int kThreads = 256;

struct NormArgs {
    float* x;            // [rows, width]: the residual, to which the parts are added
    const float* parts;  // [PARTS, rows, width]
    bf16* y;             // [rows, width]; PACKED: as tower.cu says
    const float* scale;  // [width]: the weight, or 1 + weight for RMSNorm
    const float* shift;  // [width], or null: RMSNorm, no mean
    int32_t width;       // a multiple of 4, at most 16 of each thread
    float inv_width, eps;
    float2* moments;     // PACKED: [warps][rows], of the columns of each warp a 0 and the sum of squares
    int32_t octets;      // PACKED: rows/8 rounded up
};

__device__ __forceinline__ void add(float4& to, float4 v) { to.x += v.x, to.y += v.y, to.z += v.z, to.w += v.w; }
__device__ __forceinline__ float sum_of(float4 v) { return (v.x + v.y) + (v.z + v.w); }
__device__ __forceinline__ float squares_of(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }

// LayerNorm, or RMSNorm when `shift` is null, in float32. One block a row, up to four pieces of 16 bytes a thread. With
// PARTS, what a product left in as many sums joins the residual first.
//
// A warp takes its squares about its own mean. About the row's they are those and n·(warp's mean - row's mean)² for the n
// columns of the warp: as good as a second pass over the row, for nothing is subtracted from a sum of squares, and one
// exchange between the warps is enough.
//
// PACKED: what an RMSNorm that tower.cu folds in leaves to do, the row times the weight and its squares.
template <int PARTS, bool PACKED = false>
__device__ __forceinline__ void norm(const NormArgs& a) {
    __shared__ float4 of_warp[kThreads / 32];  // mean, squares about it, columns
    const int row = blockIdx.x, quads = a.width / 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const bool centred = PARTS == 0 && !PACKED && a.shift;
    float4 v[4], scale[4], shift[4], parts[PARTS + 1][4];
    int columns = 0;
    grid_launch_dependents();
    // What is the model's need not wait for the kernel in front.
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = threadIdx.x + i * blockDim.x;
        scale[i] = shift[i] = make_float4(0, 0, 0, 0);
        if (c < quads) scale[i] = reinterpret_cast<const float4*>(a.scale)[c];
        if (centred && c < quads) shift[i] = reinterpret_cast<const float4*>(a.shift)[c];
        columns += 4 * max(min(quads - warp * 32 - i * static_cast<int>(blockDim.x), 32), 0);
    }
    // A block of fewer warps adds zeros for the others.
    if (threadIdx.x >= warps && threadIdx.x < kThreads / 32) of_warp[threadIdx.x] = make_float4(0, 0, 0, 0);
    const float inv_columns = columns ? 1.0f / columns : 0.0f;
    grid_wait();
    float4* x = reinterpret_cast<float4*>(a.x) + static_cast<size_t>(row) * quads;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = threadIdx.x + i * blockDim.x;
        v[i] = make_float4(0, 0, 0, 0);
        if (c >= quads) continue;
        v[i] = x[c];
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            parts[p][i] = reinterpret_cast<const float4*>(a.parts)[(static_cast<size_t>(p) * gridDim.x + row) * quads + c];
    }
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = threadIdx.x + i * blockDim.x;
        if (PARTS > 0 && c < quads) {
#pragma unroll
            for (int p = 1; p < PARTS; p++) add(parts[0][i], parts[p][i]);
            add(v[i], parts[0][i]);
            x[c] = v[i];
        }
        sum += sum_of(v[i]);
    }
    if (centred) mean = warp_sum(sum) * inv_columns;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (threadIdx.x + i * blockDim.x >= quads) continue;
        squares += squares_of(make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean));
    }
    squares = warp_sum(squares);
    if constexpr (PACKED) {
        if (threadIdx.x % 32 == 0) a.moments[static_cast<size_t>(warp) * gridDim.x + row] = make_float2(0, squares);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = threadIdx.x + i * blockDim.x;
            if (c >= quads) continue;
            const float4 s = scale[i];
            bf16* y = a.y + ((static_cast<size_t>(c / 16) * a.octets + row / 8) * 8 + row % 8) * 64 + ((c % 16 / 2) ^ (row % 8)) * 8 + c % 2 * 4;
            *reinterpret_cast<uint2*>(y) = pack_bf16x4(make_float4(v[i].x * s.x, v[i].y * s.y, v[i].z * s.z, v[i].w * s.w));
        }
        return;
    }
    if (threadIdx.x % 32 == 0) of_warp[warp] = make_float4(mean, squares, columns, 0);
    __syncthreads();
    mean = squares = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; w++)
        if (centred) mean += of_warp[w].x * of_warp[w].z;
    mean *= a.inv_width;
#pragma unroll
    for (int w = 0; w < kThreads / 32; w++) {
        const float apart = of_warp[w].x - mean;
        squares += of_warp[w].y + of_warp[w].z * apart * apart;
    }
    const float inv = rsqrtf(squares * a.inv_width + a.eps);
    uint2* y = reinterpret_cast<uint2*>(a.y);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = threadIdx.x + i * blockDim.x;
        if (c >= quads) continue;
        const float4 s = scale[i], b = shift[i];
        const uint2 o = pack_bf16x4(make_float4((v[i].x - mean) * inv * s.x + b.x, (v[i].y - mean) * inv * s.y + b.y,
                                                (v[i].z - mean) * inv * s.z + b.z, (v[i].w - mean) * inv * s.w + b.w));
        y[static_cast<size_t>(row) * quads + c] = o;
    }
}

#define NORM(PARTS)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads) row_norm_##PARTS(const __grid_constant__ NormArgs a) { norm<PARTS>(a); }
NORM(0)
NORM(2)

#define PACKED(PARTS)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads) row_packed_##PARTS(const __grid_constant__ NormArgs a) { norm<PARTS, true>(a); }
PACKED(0)
PACKED(2)

struct RopeArgs {
    bf16* qkv;  // [rows, (heads + 2)·head_dim]: rotated queries stay here, keys and values go to the cache
    const float2* rope;
    const EncodeParams* params;
    int32_t rows, heads, head_dim, layer, cache_row;  // cache_row: elements from one row of the cache to the next
};

// Half-split rotation (spec section 4); position = row. One thread per 4 pairs.
extern "C" __global__ void __launch_bounds__(kThreads) rope_cache(const __grid_constant__ RopeArgs a) {
    grid_launch_dependents();
    grid_wait();
    const int half = a.head_dim / 2, quads = half / 4, per_row = (a.heads + 2) * quads;
    const int id = blockIdx.x * kThreads + threadIdx.x;
    if (id >= a.rows * per_row) return;
    const int row = id / per_row, head = id % per_row / quads, i = id % quads * 4;
    bf16* from = a.qkv + (static_cast<size_t>(row) * (a.heads + 2) + head) * a.head_dim + i;
    uint2 lo = *reinterpret_cast<const uint2*>(from), hi = *reinterpret_cast<const uint2*>(from + half);
    bf16* to = from;
    const size_t cached = a.layer * a.params->layer_stride + static_cast<size_t>(row) * a.cache_row + i;
    if (head == a.heads) to = a.params->keys + cached;
    if (head > a.heads) to = a.params->values + cached;
    if (head <= a.heads) {
        const float4* cs = reinterpret_cast<const float4*>(a.rope + static_cast<size_t>(row) * half + i);
        const float4 c0 = cs[0], c1 = cs[1];
        const float2 l0 = unpack_bf16(lo.x), l1 = unpack_bf16(lo.y), h0 = unpack_bf16(hi.x), h1 = unpack_bf16(hi.y);
        lo = make_uint2(pack_bf16(l0.x * c0.x - h0.x * c0.y, l0.y * c0.z - h0.y * c0.w),
                        pack_bf16(l1.x * c1.x - h1.x * c1.y, l1.y * c1.z - h1.y * c1.w));
        hi = make_uint2(pack_bf16(h0.x * c0.x + l0.x * c0.y, h0.y * c0.z + l0.y * c0.w),
                        pack_bf16(h1.x * c1.x + l1.x * c1.y, h1.y * c1.z + l1.y * c1.w));
    }
    *reinterpret_cast<uint2*>(to) = lo;
    *reinterpret_cast<uint2*>(to + half) = hi;
}

struct GegluArgs {
    const bf16* gate_up;  // [rows, 2·mlp]
    bf16* y;              // [rows, mlp]
    int32_t rows, mlp;    // mlp a multiple of 8
};

// y = gelu_tanh(gate) ⊙ up. One thread per 8 columns.
extern "C" __global__ void __launch_bounds__(kThreads) geglu(const __grid_constant__ GegluArgs a) {
    grid_launch_dependents();
    grid_wait();
    const int per_row = a.mlp / 8;
    const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (id >= static_cast<int64_t>(a.rows) * per_row) return;
    const int64_t row = id / per_row, c = id % per_row * 8;
    const uint4 g = *reinterpret_cast<const uint4*>(a.gate_up + row * 2 * a.mlp + c);
    const uint4 u = *reinterpret_cast<const uint4*>(a.gate_up + row * 2 * a.mlp + a.mlp + c);
    auto one = [](uint32_t gate, uint32_t up) {
        const float2 x = unpack_bf16(gate), y = unpack_bf16(up);
        return pack_bf16(gelu_tanh(x.x) * y.x, gelu_tanh(x.y) * y.y);
    };
    *reinterpret_cast<uint4*>(a.y + row * a.mlp + c) = make_uint4(one(g.x, u.x), one(g.y, u.y), one(g.z, u.z), one(g.w, u.w));
}
