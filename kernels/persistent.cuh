// What the warps of the persistent decoder share: its arguments, a block's shared memory, and how work is cut.
#pragma once
#include "common.cuh"
#include "operands.cuh"

constexpr int kWidth = 1024, kHeads = 8, kHead = 256, kMlp = 4096;  // the published action expert
constexpr int kAttention = kHeads * kHead;
constexpr int kRanks = 4;        // blocks of a cluster
constexpr int kPanelRows = 52;   // token rows of an activation panel; an operand of 64 reads on into what follows
constexpr int kOwn = 13;         // token rows that each rank finishes
constexpr int kMostRows = 51;    // token rows at most (plan.rs): one fewer than a panel has
constexpr int kRowThreads = 96 + 4 * (kMostRows - 48);  // of a warpgroup, those that have token rows: up to the fourth warp's third
constexpr int kWidthTiles = kWidth / 8, kQkvTiles = (kHeads + 2) * kHead / 8, kMlpTiles = 2 * kMlp / 8;
constexpr int kTurnedTiles = (kHeads + 1) * kHead / 8;  // of QKV: those of queries and keys
constexpr int kComputing = 256, kThreads = kComputing + 64;
constexpr int kChunk = 128;            // K of one chunk of weights
constexpr int kTile = 8 * kChunk * 2;  // bytes of a tile in it
constexpr int kKeys = 32;             // keys of one piece
constexpr int kGroup = 43;            // query rows at once: on ten clusters all, the state's among them
constexpr int kMostKeys = 23;         // pieces of a rank's keys at most: twelve of a warpgroup, the suffix among them
constexpr int kRow = kHead * 2 + 16;  // bytes of a key, padded against bank conflicts; in the cache too
constexpr int kOctet = kPanelRows * 16;  // bytes of 8 of K in a panel
constexpr int kActs = kWidth / 8 * kOctet;
constexpr uint64_t kPatience = 2000000000;  // ns that a block waits for the others
constexpr float kEps = 1e-6f;

constexpr int kShared = 227 * 1024;  // bytes of a block
constexpr int largest(int a, int b) { return a > b ? a : b; }

// Columns of a product come in tiles of 8, a unit of which is multiplied at once: at most WIDE of gate/up. Where clusters are few
// each has more of them, and units are larger: fewer exchanges, and activations are read less often. 9: 26 clusters and more;
// 11: for 12 clusters, whose blocks have 22 tiles of gate/up, 11 of T, O and down, and 7 of QKV; 10: for others.
template <int WIDE>
struct Units {
    static constexpr bool kFew = WIDE > 9;
    static constexpr int kNarrow = WIDE == 9 ? 5 : WIDE == 11 ? 6 : 10, kQkv = WIDE == 9 ? 6 : WIDE == 11 ? 7 : 8, kWide = WIDE;  // of T, O and down; of QKV; of gate/up
    static constexpr int kChunks = kFew ? 1 : 2;  // of a piece of T, O and down; others have one
    static constexpr int kInbox = kFew ? kNarrow : kQkv, kInboxes = kFew ? 1 : 2;  // tiles of a unit whose sums go between ranks, and of how many units
    // Floats of the inboxes. Where clusters are few they also hold a warpgroup's sums of QKV.
    static constexpr int kInboxFloats = largest(kInboxes * kRanks * kInbox * kOwn * 8, kFew ? kQkv * kRowThreads * 4 : 0);
    static constexpr int kSlot = largest(largest(kChunks * kNarrow, largest(kQkv, kWide)) * kTile, kKeys * kRow);
    static constexpr int kStages = (kShared - 1024 - kActs - kInboxFloats * 4) / kSlot;
    static_assert(kStages > 4, "warpgroups may be four pieces of keys apart");
};

// Counters of blocks that have finished a phase. Some phases wait for all blocks, others only for those that make a part of
// what they read: a head of QKV's result, or a quarter of the attention's or of gate/up's.
constexpr int kWholes = 0, kHeadParts = 1, kQuarters = kHeadParts + kHeads + 2, kCounters = kQuarters + kRanks;
constexpr int kCounterWords = 32;  // from one to the next

// Everything of one layer at one step.
struct LayerArgs {
    const bf16* weights[4];                  // of QKV, O, gate/up and down, packed [k/128][tiles][16][8][8]
    const float *qkv_bias, *gate_up_bias;    // in packed order, or null
    const float *mid_scale, *mid_gate;       // [width]: norm before gate/up; gate of the attention, or null
    const float *end_scale, *end_gate;       // norm after this layer; gate of the MLP, or null
};

// What of the flow differs by step.
struct StepArgs {
    const float *scale, *in_bias;       // [width] of the norm before the first layer and of the in-projection
    const float *out_bias, *out_scale;  // [action_dim] of the out-projection, and [width] of the final norm
    float time;
};

struct PersistentArgs {
    const LayerArgs* layers;     // [step_count][layer_count]
    const StepArgs* steps;       // [step_count]
    const DecodeParams* params;
    float* x;                    // [horizon, action_dim]
    float* velocities;           // [step_count][horizon, action_dim]
    const float* noise;          // [horizon, action_dim]
    const float* previous;       // the same, zero where absent
    const float* guidance;       // [horizon] weights
    const float* gains;          // [step_count]
    const float* state;          // [state_dim]
    const float *out_w, *in_w;   // [action_dim, width]
    const float *state_w, *state_b;  // [state_dim, width] and [width]
    const float2* rope;          // [positions][head_dim/2] cos, sin
    const bf16* time_w;          // packed as above, or null: the in-projection is the residual itself (π0.5)
    const float* time_bias;      // [width]
    bf16* u;                     // panel, input of time_w
    bf16* hb[2];                 // panels: residual times the next norm's scale, before QKV and before gate/up
    bf16* q;                     // [heads][rows] of kRow bytes each
    bf16* suffix_keys;           // [layers, suffix] rows of kRow bytes
    bf16* suffix_values;
    bf16* attended;              // panel
    bf16* gated;                 // panel
    float* h;                    // [64, width], the residual
    float* squares[2];           // likewise: [ranks][width/8][16] sums of squares of a rank's rows by tile
    uint32_t* arrived;           // [kCounters] of kCounterWords each
    uint32_t* error;             // in host memory; 1: a wait was given up
    float scale, inv_width, dt;  // scale: 1/√head_dim · log2(e)
    int32_t step_count, layer_count, horizon, has_state, suffix, action_dim, state_dim;
    int32_t delay;               // test: up to so many ns of sleep before each phase; negative: block 0 is never done

    // Token rows of a step: the state's keys and values stay as the first one leaves them.
    __device__ __forceinline__ int rows(int step) const { return horizon + (step == 0 ? has_state : 0); }
};

template <class U>
struct Shared {
    alignas(128) uint8_t acts[kActs];  // activations of a product, or the attention's buffers
    alignas(128) uint8_t ring[U::kStages][U::kSlot];
    // What the ranks send of a unit, [ranks][tiles][kOwn][8]: of each warpgroup's, or of one at a time where clusters are few.
    alignas(16) float inbox[U::kInboxFloats];
    uint64_t full[U::kStages], empty[U::kStages], acts_full[4], queries_full, queries_free;
    uint64_t received[2], inbox_free[2], parts_received, parts_free, x_received, values_full, finished;
    alignas(16) float row_squares[2][4][16];  // of each warpgroup: by warp, of this rank's rows, for QKV split over the cluster
    float inverse_rms[64];        // of each token row, for gate/up and for QKV in one block
};

extern __shared__ __align__(128) uint8_t shared_memory[];

// What of `count` pieces number `of` in `many` does: [first, last).
struct Span {
    int first, last;
    __device__ __forceinline__ Span(int first, int last) : first(first), last(last) {}
    __device__ __forceinline__ Span(int count, int of, int many)
        : first(static_cast<int>(static_cast<uint32_t>(of * count) / many)),
          last(static_cast<int>(static_cast<uint32_t>((of + 1) * count) / many)) {}
};
// The parts of `each` pieces that some of [first, last) lie in.
__device__ __forceinline__ Span parts_of(Span s, uint32_t each) { return {static_cast<int>(s.first / each), static_cast<int>((s.last - 1) / each + 1)}; }
// How many of `many` have some of part number `part`, where each of them has some of the `count` pieces.
__device__ __forceinline__ uint32_t sharers(int part, int each, int count, int many) {
    const auto owner = [&](int i) { return (static_cast<uint32_t>(i + 1) * many - 1) / count; };
    const int first = part * each, last = first + each;
    return owner(last - 1) - owner(first) + 1;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init_n(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
// Orders nothing: it says that values have been read, and they have.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier) {
    asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Where the sum of squares of a token row and a tile lies.
__device__ __forceinline__ int squares_at(int row, int tile) { return (row / kOwn * kWidthTiles + tile) * 16 + row % kOwn; }
// What this thread wrote to shared memory will not be seen behind bulk copies to its place.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Operand of wgmma without swizzle: 8 rows of 16 bytes lie together; bytes from one such matrix to the next along K and
// along rows.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t along_k, uint32_t along_rows) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(along_k >> 4) << 16 |
           static_cast<uint64_t>(along_rows >> 4) << 32;
}
__device__ __forceinline__ uint32_t of_warp(uint32_t v) { return __shfl_sync(0xffffffffu, v, 0); }
__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// d += a·bᵀ, a 64 tokens by 16 of K, b N columns by 16. A, B: the operand numbers behind the floats.
#define MMA(N, FLOATS, A, B)                                                                           \
    __device__ __forceinline__ void mma(float (&d)[FLOATS], uint64_t a, uint64_t b) {                  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_FLOATS_##FLOATS \
                     "}, %" #A ", %" #B ", 1, 1, 1, 0, 0;"                                             \
                     : WGMMA_OUTS_##FLOATS                                                             \
                     : "l"(a), "l"(b));                                                                \
    }
MMA(40, 20, 20, 21)
MMA(48, 24, 24, 25)
MMA(56, 28, 28, 29)
MMA(64, 32, 32, 33)
MMA(72, 36, 36, 37)
MMA(80, 40, 40, 41)
MMA(88, 44, 44, 45)
#undef MMA

// The tiles of a product that fall to one of several, in units that are nearly equal, the last ones the
// smaller: nothing hides their end.
struct Tiles {
    Span all;
    int units;
    __device__ __forceinline__ Tiles(int count, int most, int of, int many)
        : all(count, of, many), units((all.last - all.first + most - 1) / most) {}
    __device__ __forceinline__ Span of(int unit) const {
        // Counted from the end.
        const Span s(all.last - all.first, units - 1 - unit, units);
        return {all.last - s.last, all.last - s.first};
    }
};

// What the attention's buffers take of `acts`.
__host__ __device__ constexpr int attention_bytes(int group, int pieces) {
    const int rows = (group + 15) / 16 * 16;
    return (group + 32) * kRow + group * kHead * 4 + kRanks * group * 8 + rows * 64 + rows * (pieces * kKeys + 24) * 2;
}

// How the attention is cut. A rank has a quarter of the prefix's keys and of the suffix's; a cluster has some of the packed
// query rows (row r is head r / rows of token r % rows), in groups.
struct Cut {
    int first_key, keys, pieces, columns;  // of the prefix; columns: of the scores, suffix included
    int first_suffix, suffix_keys;
    int first_row, last_row, group;
    int early;  // pieces of values that have a place in `acts` and need not wait for the ring
    __device__ __forceinline__ Cut(const PersistentArgs& a, int tokens, int rank, int cluster, int clusters, bool few) {
        const int prefix = a.params->prefix;
        const int each = ((prefix + kRanks - 1) / kRanks + 7) / 8 * 8;
        first_key = min(rank * each, prefix);
        keys = min(first_key + each, prefix) - first_key;
        pieces = (keys + kKeys - 1) / kKeys;
        columns = pieces * kKeys + 16;
        const int own = (a.suffix + kRanks - 1) / kRanks;
        first_suffix = min(rank * own, a.suffix);
        suffix_keys = min(first_suffix + own, a.suffix) - first_suffix;
        const Span rows(tokens * kHeads, cluster, clusters);
        first_row = rows.first, last_row = rows.last;
        // As many as the buffers hold, the same on every rank of a cluster, while six pieces hold the keys and the suffix.
        group = each <= 5 * kKeys && last_row - first_row > 16 ? kGroup : 16;
        early = few || last_row - first_row > 16 ? 0 : min(keys / kKeys, (kActs - attention_bytes(16, pieces)) / (kKeys * kRow));
    }
};

// The attention's buffers in `acts`.
struct Buffers {
    uint8_t *queries, *keys, *values;  // rows of kRow bytes
    float* inbox;                      // [ranks][64/8][group][8]
    float2* inbox_stats;               // [ranks][group] maximum and sum
    float *tops, *sums;                // [rows][8]: by warp
    bf16* weights;                     // [rows][columns + 8]; rows: group in whole tiles of 16
    uint8_t* early;                    // values of the prefix's first pieces
    __device__ __forceinline__ Buffers(uint8_t* acts, const Cut& c) {
        const int rows = (c.group + 15) / 16 * 16;
        queries = acts;
        keys = queries + c.group * kRow;
        values = keys + 16 * kRow;
        inbox = reinterpret_cast<float*>(values + 16 * kRow);
        inbox_stats = reinterpret_cast<float2*>(inbox + c.group * kHead);
        tops = reinterpret_cast<float*>(inbox_stats + kRanks * c.group);
        sums = tops + rows * 8;
        weights = reinterpret_cast<bf16*>(sums + rows * 8);
        early = acts + attention_bytes(c.group, c.pieces);
    }
};
static_assert(attention_bytes(kGroup, 5) <= kActs && attention_bytes(16, kMostKeys) <= kActs, "the attention's buffers fit");
static_assert(kActs / kRanks <= attention_bytes(16, 0), "QKV's activations lie before the early values");

template <int STAGES>
struct Ring {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void skip(int n) {
        slot += n;
        while (slot >= STAGES) slot -= STAGES, parity ^= 1;
    }
    __device__ __forceinline__ Ring ahead(int n) const {
        Ring r = *this;
        r.skip(n);
        return r;
    }
};

#endif
