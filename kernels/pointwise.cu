// The encoder's work between matrix products: norms, rotation into the cache, gated GELU.
#include "common.cuh"

constexpr int kThreads = 256;

struct NormArgs {
    const float* x;      // [rows, width]
    bf16* y;             // [rows, width], or packed for geglu_wide.cu
    const float* scale;  // [width]: the weight, or 1 + weight for RMSNorm
    const float* shift;  // [width], or null: RMSNorm, no mean
    int32_t width;       // a multiple of 4, at most 4096
    float inv_width, eps;
    int32_t octets;      // of the packed form: groups of 8 rows from 64 columns to the next; 0: not packed
};

// LayerNorm, or RMSNorm when `shift` is null; statistics in float32, two passes over registers. One block a row.
extern "C" __global__ void __launch_bounds__(kThreads) row_norm(const __grid_constant__ NormArgs a) {
    __shared__ float scratch[33];
    grid_launch_dependents();
    grid_wait();
    const float4* x = reinterpret_cast<const float4*>(a.x + static_cast<size_t>(blockIdx.x) * a.width);
    const int quads = a.width / 4;
    float4 v[4];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = threadIdx.x + i * kThreads;
        v[i] = c < quads ? x[c] : make_float4(0, 0, 0, 0);
        sum += v[i].x + v[i].y + v[i].z + v[i].w;
    }
    float mean = 0.0f;
    if (a.shift) mean = block_sum(sum, scratch) * a.inv_width;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (threadIdx.x + i * kThreads >= quads) continue;
        v[i].x -= mean, v[i].y -= mean, v[i].z -= mean, v[i].w -= mean;
        squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
    const float inv = rsqrtf(block_sum(squares, scratch) * a.inv_width + a.eps);
    uint2* y = reinterpret_cast<uint2*>(a.y + static_cast<size_t>(blockIdx.x) * a.width);
    const int row = blockIdx.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int c = threadIdx.x + i * kThreads;
        if (c >= quads) continue;
        const float4 s = reinterpret_cast<const float4*>(a.scale)[c];
        float4 o = make_float4(v[i].x * inv * s.x, v[i].y * inv * s.y, v[i].z * inv * s.z, v[i].w * inv * s.w);
        if (a.shift) {
            const float4 b = reinterpret_cast<const float4*>(a.shift)[c];
            o.x += b.x, o.y += b.y, o.z += b.z, o.w += b.w;
        }
        if (a.octets == 0)
            y[c] = pack_bf16x4(o);
        else
            reinterpret_cast<uint2*>(a.y)[(c / 16 * a.octets + row / 8) * 128 + row % 8 * 16 + (c / 2 ^ row) % 8 * 2 + c % 2] = pack_bf16x4(o);
    }
}

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
