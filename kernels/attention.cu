// Bidirectional attention of the encoder (SigLIP and the prefix trunk).
#include "attention.cuh"

struct AttentionArgs {
    const bf16* q;  // element (batch, row, head, d) at batch·q_batch + row·q_row + head·head_dim + d
    const bf16* k;  // element (batch, key, head, d) at batch·kv_batch + key·kv_row + head·kv_head + d; null: the cache
    const bf16* v;
    bf16* out;      // element (batch, row, head, d) at batch·out_batch + row·out_row + head·head_dim + d
    const EncodeParams* params;
    int64_t q_batch, kv_batch, out_batch;
    int32_t q_row, kv_row, kv_head, out_row, rows, keys, head_dim, layer;
    float scale;    // 1/√head_dim · log2(e)
    int32_t heads, out_octets;  // for attention_wide.cu and attention_vision.cu only
};

// grid (row blocks, heads, batch).
template <int HD, int KEYS>
__device__ __forceinline__ void attention(const AttentionArgs& a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int row0 = blockIdx.x * kRows, head = blockIdx.y, batch = blockIdx.z;
    grid_launch_dependents();
    grid_wait();
    const bf16* q = a.q + batch * a.q_batch + head * a.head_dim + static_cast<size_t>(row0) * a.q_row;
    const bf16 *k, *v;
    if (a.k) {
        k = a.k + batch * a.kv_batch + head * a.kv_head;
        v = a.v + batch * a.kv_batch + head * a.kv_head;
    } else {
        k = a.params->keys + a.layer * a.params->layer_stride;
        v = a.params->values + a.layer * a.params->layer_stride;
    }
    auto query = [&](int r) { return q + static_cast<size_t>(r) * a.q_row; };
    auto key = [&](int r) { return k + static_cast<size_t>(r) * a.kv_row; };
    auto value = [&](int r) { return v + static_cast<size_t>(r) * a.kv_row; };
    const int seen[2] = {a.keys, a.keys}, t = threadIdx.x % 4;
    Attended<HD> found;
    if (!attend<HD, KEYS>(shared, query, a.rows - row0, key, value, a.keys, a.head_dim, a.scale, seen, found)) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row0 + attended_row(r);
        if (row >= a.rows) continue;
        const float inv = 1.0f / found.sum[r];
        bf16* out = a.out + batch * a.out_batch + static_cast<size_t>(row) * a.out_row + head * a.head_dim;
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            const int d = j * 8 + 2 * t;
            if (d < a.head_dim)
                *reinterpret_cast<uint32_t*>(out + d) = pack_bf16(found.o[j][2 * r] * inv, found.o[j][2 * r + 1] * inv);
        }
    }
}

#define ATTENTION(HD, KEYS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads) attention_##HD(const __grid_constant__ AttentionArgs a) { \
        attention<HD, KEYS>(a);                                                                                    \
    }
// As many keys a tile as fit the shared memory of every chip (plan.rs).
ATTENTION(32, 64)
ATTENTION(80, 64)
ATTENTION(128, 64)
ATTENTION(256, 32)
