// What the decoder's products have in common, whichever kernel multiplies: arguments, and what becomes of the sums.
#pragma once
#include "common.cuh"

constexpr int kTile = 64;  // weight rows of a packed tile

struct SkinnyArgs {
    const bf16* w;        // packed [tiles][k/32][4][2][32][8]
    const bf16* x;        // panel [k/8][stride][8]
    const float* squares;  // [square_tiles][64] partial sums of squares of the input rows, or null: no normalisation
    const float* bias;    // [tiles·64] in packed row order, or null
    const void* next;     // weights to move into L2 for a later kernel, or null
    uint64_t next_bytes;
    int32_t square_tiles;
    float inv_width;
    int32_t rows;         // valid token rows
    int32_t k;            // padded K
    int32_t slice;        // K of one block, a multiple of 128
    // Attention projections.
    bf16* q;              // [64, q_stride]
    bf16* suffix_keys;    // [1 + horizon, head_dim]
    bf16* suffix_values;
    const float2* rope;   // [positions, head_dim/2] cos, sin
    const DecodeParams* params;
    int32_t q_stride, heads, head_dim, horizon, has_state;
    // GeGLU.
    bf16* y;              // panel
    // Residual.
    float* h;             // [64, h_stride]
    bf16* hb;             // panel: h scaled by `scale`, the next product's input
    const float* scale;   // [tiles·64] of the next norm
    const float* gate;    // [tiles·64] adaptive gate, or null
    float* squares_out;   // [square_tiles][64]
    int32_t h_stride, init;  // init: h = product + bias instead of h += product
};

enum Epilogue { kQkv = 0, kGeglu = 1, kResidual = 2 };

constexpr float kRmsEps = 1e-6f;

__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Columns m..m+3 of row n join the residual stream. `old` is what that holds, `scale` the next norm's. Returns the sum
// of the results' squares.
__device__ __forceinline__ float store_residual(const SkinnyArgs& a, int n, int m, int stride, float4 v, float4 old, float4 scale) {
    if (a.init) {
        if (a.bias) v = v + load4(a.bias + m);
    } else {
        if (a.gate) v = v * load4(a.gate + m);
        v = v + old;
    }
    *reinterpret_cast<float4*>(a.h + static_cast<size_t>(n) * a.h_stride + m) = v;
    *reinterpret_cast<uint2*>(a.hb + panel(n, m, stride)) = pack_bf16x4(v * scale);
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

// Packed so that a tile holds 32 pairs (gate and up, or i and i + head_dim/2): pair p is in rows p % 32 and p % 32 + 32
// of tile p / 32. What follows takes pairs p..p+3 of row n.

// The normalisation of the input row, and the bias.
__device__ __forceinline__ void finish_pairs(const SkinnyArgs& a, int p, float rinv, float4& lo, float4& hi) {
    lo = lo * rinv, hi = hi * rinv;
    const int slot = p / 32 * kTile + p % 32;
    if (a.bias) lo = lo + load4(a.bias + slot), hi = hi + load4(a.bias + slot + 32);
}

__device__ __forceinline__ void store_geglu(const SkinnyArgs& a, int n, int p, int stride, float4 lo, float4 hi) {
    const float4 v = make_float4(gelu_tanh(lo.x), gelu_tanh(lo.y), gelu_tanh(lo.z), gelu_tanh(lo.w)) * hi;
    *reinterpret_cast<uint2*>(a.y + panel(n, p, stride)) = pack_bf16x4(v);
}

// Where the keys and values of row n go: the state row, which comes last, is the first key.
__device__ __forceinline__ int suffix_row(const SkinnyArgs& a, int n) { return n == a.horizon ? 0 : a.has_state + n; }

// Cosines and sines of four pairs: (cos, sin, cos, sin) twice. Nobody writes them during a decode.
__device__ __forceinline__ void load_turn(const SkinnyArgs& a, int n, int p, int prefix, float4 (&turn)[2]) {
    const int half = a.head_dim / 2;
    if (p / half > a.heads || n >= a.rows) return;
    const float* cs = reinterpret_cast<const float*>(a.rope + static_cast<size_t>(prefix + suffix_row(a, n)) * half + p % half);
    turn[0] = load4(cs), turn[1] = load4(cs + 4);
}

// Rotated queries and keys, and values as they are.
__device__ __forceinline__ void store_qkv(const SkinnyArgs& a, int n, int p, float4 lo, float4 hi, const float4 (&turn)[2]) {
    const int half = a.head_dim / 2, head = p / half, d = p % half;
    if (head >= a.heads + 2) return;
    const int key = suffix_row(a, n);
    if (head <= a.heads) {
        const float4 c0 = turn[0], c1 = turn[1], l = lo, u = hi;
        lo = make_float4(l.x * c0.x - u.x * c0.y, l.y * c0.z - u.y * c0.w, l.z * c1.x - u.z * c1.y, l.w * c1.z - u.w * c1.w);
        hi = make_float4(u.x * c0.x + l.x * c0.y, u.y * c0.z + l.y * c0.w, u.z * c1.x + l.z * c1.y, u.w * c1.z + l.w * c1.w);
    }
    bf16* out = head < a.heads    ? a.q + static_cast<size_t>(n) * a.q_stride + head * a.head_dim
                : head == a.heads ? a.suffix_keys + static_cast<size_t>(key) * a.head_dim
                                  : a.suffix_values + static_cast<size_t>(key) * a.head_dim;
    *reinterpret_cast<uint2*>(out + d) = pack_bf16x4(lo);
    *reinterpret_cast<uint2*>(out + d + half) = pack_bf16x4(hi);
}
