// The whole decode in one kernel: every block stays on its SM through all steps and layers.
//
// One warp keeps a ring of weight blocks filled, far ahead of their use and across layers, so that memory never waits
// for the chain of dependent products. Two warpgroups compute: activations come from L2 as soon as they are there
// (dataflow.cuh), each warpgroup multiplies half of K, and their sums are added. Work is cut by shape alone; only which
// block does a piece depends on the number of blocks, so results do not.
//
// A layer: QKV by 64 weight rows -> attention by head and 64 keys -> its parts joined -> O by 64 rows and head ->
// residual and norm by token row -> gate/up by 64 rows -> down by 64 rows and 512 of K -> residual and norm.
#include "dataflow.cuh"

constexpr int kWidth = 1024, kHeads = 8, kHead = 256, kMlp = 4096;  // the published action expert
constexpr int kAttention = kHeads * kHead;
constexpr int kN = 56;              // token rows of one product
constexpr int kComputing = 256;     // threads of the two warpgroups
constexpr int kThreads = kComputing + 32;
constexpr int kBlockK = 128;        // K of one weight block, 64 rows
constexpr int kBlockBytes = 64 * kBlockK * 2;
constexpr int kSlots = 3;           // weight blocks in flight for each warpgroup
constexpr int kHalf = 64 * kN * 16;  // activations of one warpgroup: up to 512 of K
constexpr int kKeys = 64;           // keys of one piece of the attention
constexpr int kCopies = 3;          // of each activation buffer, by layer
constexpr float kEps = 1e-6f;

// Everything of one layer at one step.
struct LayerArgs {
    const bf16 *qkv, *out, *gate_up, *down;  // packed [tiles][k/8][64][8]
    const float *qkv_bias, *gate_up_bias;    // packed rows, or null
    const float *mid_scale, *mid_gate;       // [width] of the norm before gate/up; gate of the attention, or null
    const float *end_scale, *end_gate;       // the norm after this layer; gate of the MLP, or null
};

struct StepArgs {
    const float* scale;     // [width] of the first norm
    const float* in_bias;   // [width]
    const float* out_bias;  // [action_dim]
    float time, unused;
};

struct PersistentArgs {
    const LayerArgs* layers;  // [steps][layers]
    const StepArgs* steps;    // [steps]
    const DecodeParams* params;
    const float2* rope;       // [positions][128] cos, sin
    const bf16* time_w;       // packed [width, width]; null: the in-projection is the token itself
    const float* time_bias;   // [width]
    const float* in_w;        // [action_dim, width]
    const float* out_w;       // [action_dim, width]
    const float* state_w;     // [state_dim, width]
    const float* state_b;     // [width]
    const float* noise;       // [horizon, action_dim]
    const float* previous;    // the same, zero where absent
    const float* weights;     // [horizon]
    const float* gains;       // [steps]
    const float* state;       // [state_dim]
    float* x;                 // [horizon, action_dim]
    float* velocities;        // [steps, horizon, action_dim]
    float* h;                 // [56, width]
    uint8_t* exchange;        // the buffers below, filled with ones before each run
    uint32_t* error;          // 0 before each run; 1: a wait was given up
    float scale, dt;          // 1/sqrt(head_dim)*log2(e)
    int32_t step_count, layer_count, horizon, has_state, action_dim, state_dim;
    int32_t delay;            // test: up to so many ns of sleep at each phase
};

// Offsets into `exchange`; plan.rs repeats the total.
__host__ __device__ constexpr size_t panel_bytes(int k) { return static_cast<size_t>(k / 8) * kN * 16; }
constexpr size_t kKvBytes = 2 * 32 * 64 * 16;
constexpr size_t kAtQ = 0;
constexpr size_t kAtKv = kAtQ + kCopies * panel_bytes(kAttention);
constexpr size_t kAtAttended = kAtKv + kCopies * kKvBytes;
constexpr size_t kAtNorm1 = kAtAttended + kCopies * panel_bytes(kAttention);
constexpr size_t kAtNorm2 = kAtNorm1 + kCopies * panel_bytes(kWidth);
constexpr size_t kAtGated = kAtNorm2 + kCopies * panel_bytes(kWidth);
constexpr size_t kAtU = kAtGated + kCopies * panel_bytes(kMlp);
constexpr size_t kPartBytes = static_cast<size_t>(kN) * kWidth * 4;  // one slice's sums
constexpr size_t kAtOut = kAtU + kCopies * panel_bytes(kWidth);
constexpr size_t kAtDown = kAtOut + 8 * kPartBytes;
constexpr size_t kAtTime = kAtDown + 8 * kPartBytes;
constexpr size_t kAtState = kAtTime + 4 * kPartBytes;  // [32 layers][2][32][16]
constexpr int kMaxLayers = 32;
constexpr size_t kAtStats = kAtState + kMaxLayers * 1024;
constexpr int kMaxPieces = 48;
constexpr size_t kAtParts = kAtStats + static_cast<size_t>(kMaxPieces) * kHeads * kN * 8;
constexpr size_t kPieceBytes = kHeads * 32 * static_cast<size_t>(kN) * 16;  // [head][32][56][8] half

// The products, in the order of a step: the first once a step, the others in each layer.
enum Product { kTime, kQkv, kOut, kGateUp, kDown };

struct Cut {
    int tiles, k, slice;  // a piece: 64 weight rows by `slice` of `k`
};
__device__ __forceinline__ Cut cut_of(int product) {
    switch (product) {
        case kTime: return {16, kWidth, 256};
        case kQkv: return {40, kWidth, kWidth};
        case kOut: return {16, kAttention, 256};
        case kGateUp: return {128, kWidth, kWidth};
        default: return {16, kMlp, 512};
    }
}

// What of `count` pieces this block does: [first, last).
struct Span {
    int first, last;
};
__device__ __forceinline__ Span spread(uint32_t count) {
    return {static_cast<int>(blockIdx.x * count / gridDim.x), static_cast<int>((blockIdx.x + 1) * count / gridDim.x)};
}
__device__ __forceinline__ Span packed(uint32_t count, uint32_t block) {
    const uint32_t each = (count + gridDim.x - 1) / gridDim.x;
    return {static_cast<int>(min(block * each, 0)), static_cast<int>(min((block + 1) * each, 0))};
}
// QKV goes to the first blocks and token rows to the last: a block that has just finished a row is not the one for which
// forty others wait.
__device__ __forceinline__ Span pieces_of(int product) {
    const Cut c = cut_of(product);
    return product == kQkv ? packed(c.tiles, blockIdx.x) : spread(c.tiles * (c.k / c.slice));
}
// Spans of other work, behind those of the products.
// Pieces of keys: the suffix has one of its own.
__device__ __forceinline__ int key_pieces(int prefix) { return (prefix + kKeys - 1) / kKeys + 1; }

enum Work { kKeysOfHeads = kDown + 1, kOctets, kRows };
__device__ __forceinline__ Span token_rows() { return packed(kN, gridDim.x - 1 - blockIdx.x); }

static_assert(kAtParts == 8773632, "plan.rs knows this number");

struct Shared {
    PersistentArgs args;
    alignas(128) uint8_t acts[2 * kHalf];
    uint8_t ring[2][kSlots][kBlockBytes];
    float sums[28][128];
    float top[2][4][32], total[2][4][32];
    float squares[8];
    float inputs[128];
    uint64_t full[2][kSlots], empty[2][kSlots];
    Span spans[8];
};

static_assert(sizeof(Shared) <= 227 * 1024, "more than an SM has");

extern __shared__ __align__(128) uint8_t shared_memory[];
__device__ __forceinline__ Shared& block() { return *reinterpret_cast<Shared*>(shared_memory); }

// As gelu_tanh, with the quick division: its argument is at least one.
__device__ __forceinline__ float gelu_quick(float x) {
    const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return __fdividef(x, 1.0f + __expf(-2.0f * u));
}

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Goes through a block's weights in the order of their use.
struct Walk {
    const PersistentArgs& a;
    int step, layer, product, piece, b;
    const bf16* matrix;
    Cut cut;
    __device__ __forceinline__ explicit Walk(const PersistentArgs& a) : a(a), step(0), layer(0), product(a.time_w ? kTime : kQkv), b(0) { open(); }
    __device__ __forceinline__ bool over() const { return step == a.step_count; }
    __device__ __forceinline__ void open() {
        const LayerArgs& l = a.layers[step * a.layer_count + layer];
        matrix = product == kTime ? a.time_w : product == kQkv ? l.qkv : product == kOut ? l.out : product == kGateUp ? l.gate_up : l.down;
        cut = cut_of(product);
        piece = block().spans[product].first;
    }
    // To the first block at or after this place.
    __device__ __forceinline__ void settle() {
        while (!over() && piece >= block().spans[product].last) {
            if (product++ == kDown) {
                product = kQkv;
                if (++layer == a.layer_count) {
                    layer = 0, step++;
                    if (over()) return;
                    if (a.time_w) product = kTime;
                }
            }
            open();
        }
    }
    // Where a warpgroup's next block lies.
    __device__ __forceinline__ const bf16* at(int wg) const {
        const bool whole = cut.slice == cut.k;
        const int tile = whole ? piece : piece % 16, slice = whole ? 0 : piece / 16;
        return matrix + static_cast<size_t>(tile) * 64 * cut.k + (slice * cut.slice + wg * cut.slice / 2 + b) * 64;
    }
    __device__ __forceinline__ void next() {
        if ((b += kBlockK) == cut.slice / 2) b = 0, piece++;
    }
};

constexpr int kAhead = 3;  // blocks of each warpgroup on their way to L2 while the ring is full

__device__ __forceinline__ void stream_weights(const PersistentArgs& a, Shared& s) {
    uint64_t policy;
    // Weights pass once a step, the keys and values of the prefix ten times: those shall stay in L2.
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    Walk now(a), ahead(a);
    uint32_t slot = 0, parity = 1;
    int lead = 0;
#pragma unroll 1
    for (now.settle(); !now.over(); now.next(), now.settle()) {
#pragma unroll 1
        for (ahead.settle(); lead <= kAhead && !ahead.over(); ahead.next(), ahead.settle(), lead++)
            for (int wg = 0; wg < 2; wg++)
                asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(ahead.at(wg)), "r"(kBlockBytes), "l"(policy) : "memory");
        for (int wg = 0; wg < 2; wg++) {
            barrier_wait(&s.empty[wg][slot], parity);
            barrier_expect(&s.full[wg][slot], kBlockBytes);
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                             smem_address(s.ring[wg][slot])),
                         "l"(now.at(wg)), "r"(kBlockBytes), "r"(smem_address(&s.full[wg][slot])), "l"(policy)
                         : "memory");
        }
        lead--;
        if (++slot == kSlots) slot = 0, parity ^= 1;
    }
}

constexpr float4 nothing = {0.0f, 0.0f, 0.0f, 0.0f};

struct Compute {
    Watch watch;
    int tid, wid, lane, g, t;  // wid: warp within its warpgroup; g, t: row and pair of a fragment
    const int wg, prefix, pieces;
    uint32_t slot, parity;
    uint32_t phase;
    int rows, step, layer, count;        // count: layers done since the start, over all steps
    int turn_of[3];                      // which copy of an activation buffer layers count, count + 1 and count + 2 use

    __device__ __forceinline__ explicit Compute(const PersistentArgs& a)
        : watch{a.error, false}, tid(threadIdx.x), wid(__shfl_sync(0xffffffffu, threadIdx.x % 128 / 32, 0)), lane(threadIdx.x % 32),
          g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), wg(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0)), prefix(a.params->prefix), pieces(key_pieces(a.params->prefix)),
          slot(0), parity(0), phase(0), turn_of{0, 1, 2}, rows(a.horizon + a.has_state), step(0), layer(0), count(0) {}

    // The copy of layer count + `later`, of a step's own buffer that of step + `later`.
    __device__ __forceinline__ uint8_t* copy_of(size_t at, size_t bytes, int later) const {
        const int n = at == kAtU ? (step + later) % kCopies : later == 0 ? turn_of[0] : later == 1 ? turn_of[1] : later == 2 ? turn_of[2] : turn_of[0];
        return block().args.exchange + at + n * static_cast<uint32_t>(bytes);
    }
    __device__ __forceinline__ void all_meet() { meet(1, kComputing); }
    __device__ __forceinline__ void group_meet() { meet(2 + wg, 128); }
    // Addresses are worked out anew in each piece: the compiler would keep those of all phases, and spill them.
    __device__ __forceinline__ void forget() {
        asm volatile("" : "+r"(tid), "+r"(wid), "+r"(lane), "+r"(g), "+r"(t), "+r"(rows), "+r"(count), "+r"(layer));
    }
    __device__ __forceinline__ void begin_phase() {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        phase++;
        forget();
        if (a.delay) {
            uint32_t z = (blockIdx.x * 2654435761u) ^ (phase * 0x9e3779b9u) ^ static_cast<uint32_t>(a.delay);
            z ^= z >> 16, z *= 0x7feb352du, z ^= z >> 15, z *= 0x846ca68bu, z ^= z >> 16;
            __nanosleep(z % static_cast<uint32_t>(a.delay));
        }
    }
    // What this thread emptied two layers ahead is empty for everybody before it hands on anything of the next layer.
    __device__ __forceinline__ void settle() { __threadfence(); }

    // This warpgroup's activations: `slice` / 2 of K from `from`, in rounds of 256; half a round is taken twice.
    __device__ __forceinline__ void take(const uint8_t* from, int slice) {
        Shared& s = block();
        const int i0 = tid % 128 * 16, back = slice == 256 ? 7 * 2048 : 0;
        from += i0;
        uint8_t* to = s.acts + wg * kHalf + i0;
#pragma unroll 1
        for (int k = 0; k < slice; k += 512, from += 14 * 2048, to += 14 * 2048) {
            uint4 v[14];
            await<14>(v, [&](int j) { return from + j * 2048 - (j < 7 ? 0 : back); }, NotEmpty{}, watch);
#pragma unroll
            for (int j = 0; j < 14; j++) *reinterpret_cast<uint4*>(to + j * 2048 - (j < 7 ? 0 : back)) = v[j];
        }
    }

    __device__ __forceinline__ void release(uint32_t used) {
        Shared& s = block();
        if (lane == 0) barrier_arrive(&s.empty[wg][used]);
    }

    // acc = weights * activations over `blocks` blocks of K each warpgroup, then both halves of K are added: warpgroup 0
    // ends with the sums of token tiles 0 to 3 (acc[0..16]), warpgroup 1 with 4 to 6 (acc[16..28]).
    __device__ __forceinline__ void product(float (&acc)[28], int blocks) {
        Shared& s = block();
        uint32_t acts = smem_address(s.acts + wg * kHalf), before = 0;
#pragma unroll 1
        for (int b = 0; b < blocks; b++, acts += 16 * kN * 16) {
            barrier_wait(&s.full[wg][slot], parity);
            const uint64_t w = operand(of_warp(smem_address(s.ring[wg][slot])), 1024, 128), x = operand(of_warp(acts), kN * 16, 128);
            mma_begin();
#pragma unroll
            for (int k = 0; k < kBlockK / 16; k++)
                mma_64x56(acc, along(w, k * 2048), along(x, k * 2 * kN * 16), k > 0 ? 1 : b);
            mma_commit();
            if (b > 0) {
                mma_wait<1>();
                release(before);
            }
            before = slot;
            if (++slot == kSlots) slot = 0, parity ^= 1;
        }
        mma_wait<0>();
        release(before);
        all_meet();  // the sums of the product before have been read
        if (wg == 0) {
#pragma unroll
            for (int i = 16; i < 28; i++) s.sums[i][tid % 128] = acc[i];
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) s.sums[i][tid % 128] = acc[i];
        }
        all_meet();
        if (wg == 0) {
#pragma unroll
            for (int i = 0; i < 16; i++) acc[i] += s.sums[i][tid % 128];
        } else {
#pragma unroll
            for (int i = 16; i < 28; i++) acc[i] += s.sums[i][tid % 128];
        }
    }

    // Calls f(j, d0, d1, d2, d3) for each token tile j this warpgroup ended with.
    template <class F>
    __device__ __forceinline__ void each_tile(float (&acc)[28], F f) {
        if (wg == 0) {
#pragma unroll
            for (int j = 0; j < 4; j++) f(j, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        } else {
#pragma unroll
            for (int j = 4; j < 7; j++) f(j, acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        }
    }

    // Queries, keys and values of 32 pairs of the rotation.
    __device__ __forceinline__ void keep_qkv(float (&acc)[28], int tile, const float2 (&turn)[4][2], float lo_bias, float hi_bias) {
        const PersistentArgs& a = block().args;
        const int head = tile / 4, octet = tile % 4 * 4 + wid;
        uint8_t *to = copy_of(kAtQ, panel_bytes(kAttention), 0), *next = copy_of(kAtQ, panel_bytes(kAttention), 2);
        size_t at = (static_cast<size_t>(head * 32 + octet) * kN + g) * 16 + t * 4, up = 16 * kN * 16;
        uint8_t* state = a.exchange + kAtState + layer * 1024 + (head > kHeads ? 512 : 0) + octet * 16 + t * 4;
        if (head >= kHeads) {
            to = copy_of(kAtKv, kKvBytes, 0), next = copy_of(kAtKv, kKvBytes, 2);
            at = (head > kHeads ? kKvBytes / 2 : 0) + (octet * 64 + a.has_state + g) * 16 + t * 4, up = 16 * 64 * 16;
        }
        each_tile(acc, [&](int j, float d0, float d1, float d2, float d3) {
            const float2 c0 = turn[j % 4][0], c1 = turn[j % 4][1];
            d0 += lo_bias, d1 += lo_bias, d2 += hi_bias, d3 += hi_bias;
            const uint32_t lo = transpose_8x8(pack_bf16(d0 * c0.x - d2 * c0.y, d1 * c1.x - d3 * c1.y));
            const uint32_t hi = transpose_8x8(pack_bf16(d2 * c0.x + d0 * c0.y, d3 * c1.x + d1 * c1.y));
            const int n = 8 * j + g;
            if (head < kHeads || n < a.horizon) {
                publish(to + at + j * 128, lo), publish(to + at + up + j * 128, hi);
                publish(next + at + j * 128, kEmpty), publish(next + at + up + j * 128, kEmpty);
            } else if (n < rows) {
                // Of the rows past the actions only the state's counts, and only in the first step.
                publish(state, lo), publish(state + 256, hi);
            }
        });
    }

    // gelu(gate) * up of 32 columns.
    __device__ __forceinline__ void keep_gated(float (&acc)[28], int tile, float gate_bias, float up_bias) {
        uint8_t *to = copy_of(kAtGated, panel_bytes(kMlp), 0), *next = copy_of(kAtGated, panel_bytes(kMlp), 2);
        const size_t at = (static_cast<size_t>(tile * 4 + wid) * kN + g) * 16 + t * 4;
        each_tile(acc, [&](int j, float d0, float d1, float d2, float d3) {
            const uint32_t v =
                transpose_8x8(pack_bf16(gelu_quick(d0 + gate_bias) * (d2 + up_bias), gelu_quick(d1 + gate_bias) * (d3 + up_bias)));
            publish(to + at + j * 128, v), publish(next + at + j * 128, kEmpty);
        });
    }

    // Sums of one slice of K for the token rows' blocks, [56, width].
    __device__ __forceinline__ void keep_part(float (&acc)[28], int tile, uint8_t* part, uint32_t mark) {
        // Four lanes that hold four neighbouring columns swap, so that each has them all for one token.
        const int q = g % 4, row = (q >> 1) * 8 + g / 4 * 4, token = 2 * t + (q & 1);
        uint8_t* to = part + (static_cast<size_t>(token) * kWidth + tile * 64 + wid * 16 + row) * 4;
        each_tile(acc, [&](int j, float d0, float d1, float d2, float d3) {
            const bool odd = q & 1, high = q & 2;
            const float r0 = __shfl_xor_sync(0xffffffffu, odd ? d0 : d1, 4), r1 = __shfl_xor_sync(0xffffffffu, odd ? d2 : d3, 4);
            const float e0 = odd ? r0 : d0, e1 = odd ? d1 : r0, f0 = odd ? r1 : d2, f1 = odd ? d3 : r1;
            const float s0 = __shfl_xor_sync(0xffffffffu, high ? e0 : f0, 8), s1 = __shfl_xor_sync(0xffffffffu, high ? e1 : f1, 8);
            const float v0 = high ? s0 : e0, v1 = high ? s1 : e1, v2 = high ? f0 : s0, v3 = high ? f1 : s1;
            if (8 * j + token < rows)
                publish(to + static_cast<size_t>(j) * 8 * kWidth * 4,
                        make_uint4(with_parity(v0, mark), with_parity(v1, mark), with_parity(v2, mark), with_parity(v3, mark)));
        });
    }

    __device__ __forceinline__ void multiply(int kind, const LayerArgs* w) {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        begin_phase();
        const Cut cut = cut_of(kind);
        const Span span = s.spans[kind];
        if (kind == kQkv && span.first < span.last) settle();
        const uint8_t* from = kind == kTime     ? copy_of(kAtU, panel_bytes(kWidth), 0)
                              : kind == kQkv    ? copy_of(kAtNorm1, panel_bytes(kWidth), 0)
                              : kind == kOut    ? copy_of(kAtAttended, panel_bytes(kAttention), 0)
                              : kind == kGateUp ? copy_of(kAtNorm2, panel_bytes(kWidth), 0)
                                                : copy_of(kAtGated, panel_bytes(kMlp), 0);
        int taken = -1;
#pragma unroll 1
        for (int u = span.first; u < span.last; u++) {
            forget();
            const bool whole = kind == kQkv || kind == kGateUp;
            const int tile = whole ? u : u % 16, slice = whole ? 0 : u / 16;
            const float* bias = kind == kQkv ? w->qkv_bias : kind == kGateUp ? w->gate_up_bias : nullptr;
            const float lo_bias = bias ? bias[tile * 64 + wid * 16 + g] : 0.0f, hi_bias = bias ? bias[tile * 64 + wid * 16 + g + 8] : 0.0f;
            float2 turn[4][2];
#pragma unroll
            for (int i = 0; i < 8; i++) turn[i / 2][i % 2] = make_float2(1.0f, 0.0f);
            if (kind == kQkv && tile < 4 * (kHeads + 1)) {
                const float2* at = a.rope + prefix * 128 + tile % 4 * 32 + wid * 8 + g;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int n = (wg * 4 + i / 2) * 8 + 2 * t + i % 2;
                    turn[i / 2][i % 2] = at[(n == a.horizon ? 0 : a.has_state + n) * 128];
                }
            }
            if (taken != slice) {
                take(from + static_cast<size_t>(slice * 2 + wg) * (cut.slice / 16) * kN * 16, cut.slice);
                publish_to_mma();
                group_meet();
                taken = slice;
            }
            float acc[28];
            product(acc, cut.slice / 2 / kBlockK);
            if (kind == kQkv)
                keep_qkv(acc, tile, turn, lo_bias, hi_bias);
            else if (kind == kGateUp)
                keep_gated(acc, tile, lo_bias, hi_bias);
            else
                keep_part(acc, tile, a.exchange + (kind == kTime ? kAtTime : kind == kOut ? kAtOut : kAtDown) + slice * kPartBytes,
                          (kind == kTime ? step : count) & 1);
        }
    }

    // One head's queries against 64 keys: a part of its output with the maximum and sum of the scores' exponentials.
    // The last piece holds the suffix, the others the prefix.
    __device__ __forceinline__ void attention() {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        begin_phase();
        uint8_t *sk = s.acts, *sv = sk + 32768, *sq = sv + 32768, *sp = sq + 32 * kN * 16 + wg * 4096;
        const Span span = s.spans[kKeysOfHeads];
        // Once a layer, where waiting costs least.
        if (s.spans[kQkv].first == s.spans[kQkv].last) settle();
#pragma unroll 1
        for (int u = span.first; u < span.last; u++) {
            forget();
            const int head = u % kHeads, piece = u / kHeads;
            const bool suffix = piece == pieces - 1;
            const int keys = suffix ? a.horizon + a.has_state : min(kKeys, prefix - piece * kKeys);
            if (!suffix) {
                const size_t base = layer * a.params->layer_stride + static_cast<size_t>(piece) * kKeys * kHead;
                const bf16 *pk = a.params->keys + base, *pv = a.params->values + base;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    // Eight lanes take eight keys, so that shared memory is written in whole lines.
                    const int warp = tid / 32, key = warp * 8 + lane % 8, octet = j * 4 + lane / 8;
                    const int to = (octet * 64 + key) * 16;
                    if (key < keys) {
                        copy_async_16(sk + to, pk + key * kHead + octet * 8);
                        copy_async_16(sv + to, pv + key * kHead + octet * 8);
                    } else {
                        store_zero_16(sk + to);
                        store_zero_16(sv + to);
                    }
                }
                copy_async_commit();
            }
            {
                const uint8_t* from = copy_of(kAtQ, panel_bytes(kAttention), 0) + static_cast<size_t>(head) * 32 * kN * 16;
                uint4 v[7];
                await<7>(v, [&](int j) { return from + (tid + j * 256) * 16; }, NotEmpty{}, watch);
#pragma unroll
                for (int j = 0; j < 7; j++) *reinterpret_cast<uint4*>(sq + (tid + j * 256) * 16) = v[j];
            }
            if (suffix) {
                const uint8_t* from = copy_of(kAtKv, kKvBytes, 0);
                const uint8_t* state = a.exchange + kAtState + layer * 1024;
                const int slot = tid % 64, octet = tid / 64, key = min(slot, keys - 1);
                const bool own = key >= a.has_state;
                const int stride = own ? 4 * 64 * 16 : 4 * 16;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint8_t* first = own ? from + half * (kKvBytes / 2) + (octet * 64 + key) * 16 : state + half * 512 + octet * 16;
                    uint8_t* to = (half ? sv : sk) + (octet * 64 + slot) * 16;
                    uint4 v[8];
                    await<8>(v, [&](int j) { return first + j * stride; }, NotEmpty{}, watch);
#pragma unroll
                    for (int j = 0; j < 8; j++) *reinterpret_cast<uint4*>(to + j * 4096) = slot < keys ? v[j] : make_uint4(0, 0, 0, 0);
                }
            }
            copy_async_wait<0>();
            publish_to_mma();
            all_meet();

            // Scores, keys on M: this warpgroup has 32 queries.
            float score[16];
            mma_begin();
            const uint64_t k_at = operand(smem_address(sk), 1024, 128), q_at = operand(smem_address(sq) + wg * 512, kN * 16, 128);
#pragma unroll
            for (int k = 0; k < 16; k++)
                mma_64x32<0>(score, along(k_at, k * 2048), along(q_at, k * 2 * kN * 16), k > 0);
            mma_commit();
            mma_wait<0>();
            const int key0 = wid * 16 + g;
            float top[8];
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int n = wg * 32 + 8 * j + 2 * t + c;
                    // The state row sees the prefix and itself only.
                    const int seen = suffix && n == a.horizon ? 1 : keys;
                    float &lo = score[4 * j + c], &hi = score[4 * j + 2 + c];
                    lo = key0 < seen ? lo * a.scale : -INFINITY;
                    hi = key0 + 8 < seen ? hi * a.scale : -INFINITY;
                    float m = fmaxf(lo, hi);
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 4));
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 8));
                    m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 16));
                    top[2 * j + c] = m;
                }
            if (g == 0)
#pragma unroll
                for (int i = 0; i < 8; i++) s.top[wg][wid][i / 2 * 8 + 2 * t + i % 2] = top[i];
            group_meet();
            float sum[8];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float p[4];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int at = j * 8 + 2 * t + c;
                    const float m = fmaxf(fmaxf(s.top[wg][0][at], s.top[wg][1][at]), fmaxf(s.top[wg][2][at], s.top[wg][3][at]));
                    top[2 * j + c] = m;
                    p[c] = exp2_fast(score[4 * j + c] - m);
                    p[2 + c] = exp2_fast(score[4 * j + 2 + c] - m);
                }
                const uint32_t lo = pack_bf16(p[0], p[1]), hi = pack_bf16(p[2], p[3]);
                const float2 l = unpack_bf16(lo), h = unpack_bf16(hi);
                sum[2 * j] = l.x + h.x, sum[2 * j + 1] = l.y + h.y;
                const int to = (wid * 2 * 32 + 8 * j + g) * 16 + t * 4;
                *reinterpret_cast<uint32_t*>(sp + to) = transpose_8x8(lo);
                *reinterpret_cast<uint32_t*>(sp + to + 512) = transpose_8x8(hi);
            }
            publish_to_mma();
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 4);
                sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 8);
                sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 16);
            }
            if (g == 0)
#pragma unroll
                for (int i = 0; i < 8; i++) s.total[wg][wid][i / 2 * 8 + 2 * t + i % 2] = sum[i];
            group_meet();
            float o[4][16];
            const uint64_t v_at = operand(smem_address(sv), 128, 1024), p_at = operand(smem_address(sp), 512, 128);
            mma_begin();
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int m = 0; m < 4; m++)
                    mma_64x32<1>(o[m], along(v_at, m * 8192 + k * 256), along(p_at, k * 1024), k > 0);
            mma_commit();
            float inverse[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int at = i / 2 * 8 + 2 * t + i % 2;
                sum[i] = (s.total[wg][0][at] + s.total[wg][1][at]) + (s.total[wg][2][at] + s.total[wg][3][at]);
                inverse[i] = __fdividef(1.0f, sum[i]);
            }
            const uint32_t mark = count & 1;
            if (wid == 0 && g == 0)
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int n = wg * 32 + i / 2 * 8 + 2 * t + i % 2;
                    if (n < rows)
                        publish(a.exchange + kAtStats + (static_cast<size_t>(piece * kHeads + head) * kN + n) * 8,
                                make_uint2(with_parity(top[i], mark), with_parity(sum[i], mark)));
                }
            mma_wait<0>();
            uint8_t* to = a.exchange + kAtParts + piece * kPieceBytes + static_cast<size_t>(head) * 32 * kN * 16;
            // A weighted mean of values: half precision holds it with two bits to spare.
            auto halves = [](float x, float y) {
                const __half2 v = __floats2half2_rn(fminf(fmaxf(x, -65504.0f), 65504.0f), fminf(fmaxf(y, -65504.0f), 65504.0f));
                return *reinterpret_cast<const uint32_t*>(&v);
            };
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float f0 = inverse[2 * j], f1 = inverse[2 * j + 1];
                    const uint32_t lo = transpose_8x8(halves(o[m][4 * j] * f0, o[m][4 * j + 1] * f1));
                    const uint32_t hi = transpose_8x8(halves(o[m][4 * j + 2] * f0, o[m][4 * j + 3] * f1));
                    const int n = wg * 32 + 8 * j + g;
                    if (n < rows) {
                        uint8_t* at = to + (static_cast<size_t>(m * 8 + wid * 2) * kN + n) * 16 + t * 4;
                        publish(at, with_parity(lo, mark));
                        publish(at + kN * 16, with_parity(hi, mark));
                    }
                }
            all_meet();  // keys, values and queries may be overwritten
        }
    }

    // Joins the parts of the attention, in the order of the keys; two octets of one head a piece of work.
    __device__ __forceinline__ void join() {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        begin_phase();
        const Span span = s.spans[kOctets];
        constexpr int B = 5;
        const OfParity ready{static_cast<uint32_t>(count & 1)};
#pragma unroll 1
        for (int u = span.first; u < span.last && wg == 0; u++) {
            forget();
            // Those past the end read what the last does, so that warps stay whole.
            const int id = min(tid, 2 * kN - 1), head = u / 16, octet = u % 16 * 2 + id / kN, n = id % kN, from = min(n, rows - 1);
            const size_t at = (static_cast<size_t>(head * 32 + octet) * kN + n) * 16;
            const uint8_t* parts = a.exchange + kAtParts + (static_cast<size_t>(head * 32 + octet) * kN + from) * 16;
            const uint8_t* stats = a.exchange + kAtStats + (head * kN + from) * 8;
            float sum[8] = {}, top = -INFINITY, total = 0.0f;
            for (int p0 = 0; p0 < pieces; p0 += B) {
                uint4 v[B];
                uint2 st[B];
                // Past the end the last part stands in, without weight.
                auto part = [&](int j) { return min(p0 + j, pieces - 1); };
                await<B>(v, [&](int j) { return parts + part(j) * kPieceBytes; }, ready, watch);
#pragma unroll
                for (int j = 0; j < B; j++) st[j] = fetch_8(stats + part(j) * (kHeads * kN * 8));
#pragma unroll
                for (int j = 0; j < B; j++) {
                    for (uint32_t spins = 0; !ready(st[j]) && !watch.over(spins); spins++)
                        st[j] = fetch_8(stats + part(j) * (kHeads * kN * 8));
                    const float own = __uint_as_float(st[j].x), m = fmaxf(top, own);
                    const float keep = exp2_fast(top - m), add = p0 + j < pieces ? exp2_fast(own - m) * __uint_as_float(st[j].y) : 0.0f;
                    top = m;
                    total = total * keep + add;
                    const uint32_t word[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&word[c]));
                        sum[2 * c] = sum[2 * c] * keep + f.x * add;
                        sum[2 * c + 1] = sum[2 * c + 1] * keep + f.y * add;
                    }
                }
            }
            if (tid >= 2 * kN) continue;
            const float f = n < rows ? __fdividef(1.0f, total) : 0.0f;
            publish(copy_of(kAtAttended, panel_bytes(kAttention), 0) + at,
                    make_uint4(pack_bf16(sum[0] * f, sum[1] * f), pack_bf16(sum[2] * f, sum[3] * f), pack_bf16(sum[4] * f, sum[5] * f),
                               pack_bf16(sum[6] * f, sum[7] * f)));
            publish(copy_of(kAtAttended, panel_bytes(kAttention), 2) + at, make_uint4(kEmpty, kEmpty, kEmpty, kEmpty));
        }
    }

    __device__ __forceinline__ float sum_over_row(float v) {
        Shared& s = block();
        v = warp_sum(v);
        all_meet();
        if (lane == 0) s.squares[tid / 32] = v;
        all_meet();
        return ((s.squares[0] + s.squares[1]) + (s.squares[2] + s.squares[3])) + ((s.squares[4] + s.squares[5]) + (s.squares[6] + s.squares[7]));
    }

    // Row n of an activation panel, four columns a thread; the copy two ahead is emptied.
    __device__ __forceinline__ void hand_on(size_t at, int n, int later, float4 v) {
        const size_t offset = (static_cast<size_t>(tid / 2) * kN + n) * 16 + tid % 2 * 8;
        publish(copy_of(at, panel_bytes(kWidth), later) + offset, pack_bf16x4(v));
        publish(copy_of(at, panel_bytes(kWidth), later + 2) + offset, make_uint2(kEmpty, kEmpty));
    }

    __device__ __forceinline__ void normalise(float4 v, const float4 scale, size_t at, int n, int later) {
        const float r = rsqrtf(sum_over_row(v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w) * (1.0f / kWidth) + kEps);
        hand_on(at, n, later, make_float4(v.x * r * scale.x, v.y * r * scale.y, v.z * r * scale.z, v.w * r * scale.w));
    }

    // Sums of 4 or 8 slices for row n, in their order.
    __device__ __forceinline__ float4 gather(const uint8_t* parts, int slices, int n, uint32_t mark) {
        uint4 v[8];
        const uint8_t* from = parts + (static_cast<size_t>(n) * kWidth + 4 * tid) * 4;
        await<8>(v, [&](int j) { return from + (j & (slices - 1)) * kPartBytes; }, OfParity{mark}, watch);
        float4 r = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (j < slices)
                r.x += __uint_as_float(v[j].x), r.y += __uint_as_float(v[j].y), r.z += __uint_as_float(v[j].z), r.w += __uint_as_float(v[j].w);
        return r;
    }

    // After O, down and the time MLP: residual, then the norm in front of what follows. Each token row has one block
    // throughout.
    __device__ __forceinline__ void residual(int kind, const LayerArgs* w) {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        begin_phase();
        const bool first = kind == kTime, end = kind == kDown, last_layer = end && layer + 1 == a.layer_count;
        const float* scale = first ? a.steps[step].scale : end ? w->end_scale : w->mid_scale;
        const float* gate = first ? nullptr : end ? w->end_gate : w->mid_gate;
        const uint8_t* parts = a.exchange + (first ? kAtTime : end ? kAtDown : kAtOut);
        const size_t to = kind == kOut ? kAtNorm2 : kAtNorm1;
        const int later = end;
        const Span span = s.spans[kRows];
#pragma unroll 1
        for (int n = span.first; n < span.last; n++) {
            forget();
            if (n >= (first || last_layer ? a.horizon : rows)) {
                // Rows that are not there are zero; the state's row has been written at the start.
                if (last_layer && step + 1 < a.step_count && a.time_w)
                    hand_on(kAtU, n, 1, nothing);
                else if (!first || n >= rows)
                    hand_on(to, n, later, nothing);
                continue;
            }
            float* at = a.h + static_cast<size_t>(n) * kWidth + 4 * tid;
            const float4 old = load4(first ? a.time_bias + 4 * tid : at), by = load4(scale + 4 * tid);
            const float4 open = gate ? load4(gate + 4 * tid) : make_float4(1, 1, 1, 1);
            float4 v = gather(parts, first ? 4 : 8, n, (first ? step : count) & 1);
            v = make_float4(v.x * open.x + old.x, v.y * open.y + old.y, v.z * open.z + old.z, v.w * open.w + old.w);
            *reinterpret_cast<float4*>(at) = v;
            if (last_layer)
                finish_step(v, by, n);
            else
                normalise(v, by, to, n, later);
        }
    }

    // The tokens of step `next` for row n from the values in s.inputs.
    __device__ __forceinline__ void enter(int next, int n, int later) {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        const bool action = n < a.horizon;
        const float* w = action ? a.in_w : a.state_w;
        const int inputs = action ? a.action_dim : a.state_dim;
        float4 v = load4((action ? a.steps[next].in_bias : a.state_b) + 4 * tid);
        const float4 scale = load4(a.steps[next].scale + 4 * tid);
#pragma unroll 8
        for (int i = 0; i < inputs; i++) {
            const float4 c = load4(w + static_cast<size_t>(i) * kWidth + 4 * tid);
            const float x = s.inputs[i];
            v.x += c.x * x, v.y += c.y * x, v.z += c.z * x, v.w += c.w * x;
        }
        if (action && a.time_w) {
            hand_on(kAtU, n, later, make_float4(silu(v.x), silu(v.y), silu(v.z), silu(v.w)));
        } else {
            *reinterpret_cast<float4*>(a.h + static_cast<size_t>(n) * kWidth + 4 * tid) = v;
            normalise(v, scale, kAtNorm1, n, later);
        }
    }

    // Out-projection of the normalised row n, guidance, Euler step, and the way back in.
    __device__ __forceinline__ void finish_step(float4 v, float4 scale, int n) {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        const float r = rsqrtf(sum_over_row(v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w) * (1.0f / kWidth) + kEps);
        float* row = reinterpret_cast<float*>(s.acts);
        *reinterpret_cast<float4*>(row + 4 * tid) = make_float4(v.x * scale.x, v.y * scale.y, v.z * scale.z, v.w * scale.w);
        all_meet();
        const StepArgs& now = a.steps[step];
        for (int i = tid / 32; i < a.action_dim; i += 8) {
            float dot = 0.0f;
#pragma unroll
            for (int k = 0; k < kWidth; k += 128) {
                const float4 w = load4(a.out_w + static_cast<size_t>(i) * kWidth + k + lane * 4), x = load4(row + k + lane * 4);
                dot += w.x * x.x + w.y * x.y + w.z * x.z + w.w * x.w;
            }
            dot = warp_sum(dot);
            if (lane == 0) {
                const int at = n * a.action_dim + i;
                float velocity = r * dot + now.out_bias[i];
                a.velocities[static_cast<size_t>(step) * a.horizon * a.action_dim + at] = velocity;
                const float x = a.x[at];
                if (a.params->guided) {
                    const float target = x - now.time * velocity;
                    velocity -= a.gains[step] * (a.weights[n] * (a.previous[at] - target));
                }
                a.x[at] = s.inputs[i] = x + a.dt * velocity;
            }
        }
        all_meet();
        if (step + 1 < a.step_count) enter(step + 1, n, 1);
    }

    __device__ __forceinline__ void start() {
        Shared& s = block();
        const PersistentArgs& a = s.args;
        begin_phase();
        const Span span = s.spans[kRows];
#pragma unroll 1
        for (int n = span.first; n < span.last; n++) {
            forget();
            if (n >= a.horizon && a.time_w) hand_on(kAtU, n, 0, nothing);
            if (n >= rows) {
                if (!a.time_w) hand_on(kAtNorm1, n, 0, nothing);
                continue;
            }
            all_meet();
            if (n < a.horizon) {
                for (int i = tid; i < a.action_dim; i += kComputing) a.x[n * a.action_dim + i] = s.inputs[i] = a.noise[n * a.action_dim + i];
            } else {
                for (int i = tid; i < a.state_dim; i += kComputing) s.inputs[i] = a.state[i];
            }
            all_meet();
            enter(0, n, 0);
        }
    }

    __device__ __forceinline__ void run() {
        const PersistentArgs& a = block().args;
        start();
        int kind = a.time_w ? kTime : kQkv;
        while (step < a.step_count) {
            // The state row's keys and values do not change: it takes part in the first step only.
            rows = a.horizon + (step == 0 ? a.has_state : 0);
            const LayerArgs* w = a.layers + step * a.layer_count + layer;
            if (kind == kOut) {
                attention();
                join();
            }
            multiply(kind, w);
            if (kind != kQkv && kind != kGateUp) residual(kind, w);
            if (kind == kDown) {
                kind = kQkv, count++;
                const int done = turn_of[0];
                turn_of[0] = turn_of[1], turn_of[1] = turn_of[2], turn_of[2] = done;
                if (++layer == a.layer_count) {
                    layer = 0, step++;
                    if (a.time_w) kind = kTime;
                }
            } else {
                kind++;
            }
        }
    }
};

#endif

extern "C" __global__ void __launch_bounds__(kThreads, 1) persistent_decode(const __grid_constant__ PersistentArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    Shared& s = block();
    if (threadIdx.x == 0) {
        s.args = a;
        for (int i = kTime; i <= kDown; i++) s.spans[i] = pieces_of(i);
        s.spans[kKeysOfHeads] = spread(kHeads * key_pieces(a.params->prefix)), s.spans[kOctets] = spread(128), s.spans[kRows] = token_rows();
        for (int w = 0; w < 2; w++)
            for (int i = 0; i < kSlots; i++) barrier_init_n(&s.full[w][i], 1), barrier_init_n(&s.empty[w][i], 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 2) {
        if (threadIdx.x == kComputing) stream_weights(a, s);
    } else {
        Compute c(a);
        c.run();
    }
#endif
}
