// All layers of one flow-matching step in one cooperative kernel: blocks stay on their SMs and meet at grid barriers.
//
// A block is eight warps that compute and two that fetch. One keeps a ring of pieces filled, in the order of their use and
// across barriers: weights, and the prefix's keys and values. The other waits at the grid barrier and brings the activations
// of the next phase. Four blocks form a cluster. Products are cut by columns over clusters and by K over the blocks of a
// cluster, which send each other their sums; gate/up has all of K in every block instead. Which block does a piece depends
// on the number of blocks; slices of K and the order of sums do not, so results do not.
//
// A layer: QKV | attention | O | gate, up | down, with a barrier at each stroke and at the end.
#include "common.cuh"

constexpr int kWidth = 1024, kHeads = 8, kHead = 256, kMlp = 4096;  // the published action expert
constexpr int kAttention = kHeads * kHead;
constexpr int kRanks = 4;        // blocks of a cluster
constexpr int kPanelRows = 52;   // token rows of an activation panel; an operand of 64 reads on into what follows
constexpr int kOwn = 13;         // token rows that each rank finishes
// Columns of a product come in tiles of 8, a unit of which is multiplied at once; at most so many tiles:
constexpr int kNarrow = 5, kQkv = 6, kWide = 9;  // of T, O and down; of QKV; of gate/up
constexpr int kWidthTiles = kWidth / 8, kQkvTiles = (kHeads + 2) * kHead / 8, kMlpTiles = 2 * kMlp / 8;
constexpr int kComputing = 256, kThreads = kComputing + 64;
constexpr int kChunk = 128;           // K of one chunk of weights; a piece is one, or two where units are narrow
constexpr int kTile = 8 * kChunk * 2;  // bytes of a tile in it
constexpr int kStages = 5, kSlot = 2 * kNarrow * kTile;
static_assert(kWide * kTile <= kSlot && kQkv * kTile <= kSlot, "a piece fits");
constexpr int kKeys = 32;             // keys of one piece
constexpr int kRow = kHead * 2 + 16;  // bytes of a key, padded against bank conflicts; in the cache too
constexpr int kOctet = kPanelRows * 16;  // bytes of 8 of K in a panel
constexpr int kActs = kWidth / 8 * kOctet;
constexpr int kMaxLayers = 32;
constexpr uint64_t kPatience = 2000000000;  // ns that a block waits for the others
static_assert(kKeys * kRow <= kSlot, "a piece of keys fits");
constexpr float kEps = 1e-6f;

// Everything of one layer at one step.
struct LayerArgs {
    const bf16 *qkv, *out, *gate_up, *down;  // packed [k/128][tiles][16][8][8]
    const float *qkv_bias, *gate_up_bias;    // in packed order, or null
    const float *mid_scale, *mid_gate;       // [width]: norm before gate/up; gate of the attention, or null
    const float *end_scale, *end_gate;       // norm after this layer; gate of the MLP, or null
};

struct PersistentArgs {
    const LayerArgs* layers;     // [layer_count] of this step
    const DecodeParams* params;
    const float2* rope;          // [positions][head_dim/2] cos, sin
    const bf16* time_w;          // packed as above, or null: the residual is there already
    const float* time_bias;      // [width]
    const float* first_scale;    // [width]: norm before the first layer
    const bf16* u;               // panel, input of time_w
    bf16* hb;                    // panel: residual times the next norm's scale
    bf16* q;                     // [rows·heads, head_dim]
    bf16* suffix_keys;           // [layers, suffix, head_dim]
    bf16* suffix_values;
    bf16* attended;              // panel
    bf16* gated;                 // panel
    float* h;                    // [64, width], the residual
    float* squares;              // [64][width/8] sums of squares of its rows by tile
    uint32_t* arrived;           // blocks that have got to a barrier, over all steps
    uint32_t* error;             // in host memory; 1: a wait was given up
    float scale, inv_width;      // 1/√head_dim · log2(e)
    int32_t layer_count, horizon, has_state, rows, suffix, barriers;  // barriers: of the steps before
    int32_t delay;               // test: up to so many ns of sleep before each phase; negative: block 0 is never done
};

struct Shared {
    alignas(128) uint8_t acts[kActs];  // activations of a product, or the attention's buffers
    alignas(128) uint8_t ring[kStages][kSlot];
    float inbox[2][kRanks][kQkv][kOwn][8];  // of each warpgroup: what the ranks send of its unit
    uint64_t full[kStages], empty[kStages], acts_full[4], queries_full, queries_free;
    uint64_t received[2], inbox_free[2], parts_received, parts_free;
    float inverse_rms[64];  // of each token row, for gate/up
    LayerArgs layers[kMaxLayers];
};
static_assert(sizeof(Shared) <= 227 * 1024, "more than an SM has");

extern __shared__ __align__(128) uint8_t shared_memory[];

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

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
// d += a·bᵀ, a 64 tokens by 16 of K, b 40, 48 or 72 columns by 16.
__device__ __forceinline__ void mma(float (&d)[4 * kNarrow], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n40k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19}, %20, %21, 1, 1, 1, 0, 0;"
        : D4(0), D4(4), D4(8), D4(12), D4(16)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void mma(float (&d)[4 * kQkv], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, %24, %25, 1, 1, 1, 0, 0;"
        : D4(0), D4(4), D4(8), D4(12), D4(16), D4(20)
        : "l"(a), "l"(b));
}
__device__ __forceinline__ void mma(float (&d)[4 * kWide], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35}, %36, %37, 1, 1, 1, 0, 0;"
        : D4(0), D4(4), D4(8), D4(12), D4(16), D4(20), D4(24), D4(28), D4(32)
        : "l"(a), "l"(b));
}
#undef D4

// What of `count` pieces number `of` in `many` does: [first, last).
struct Span {
    int first, last;
    __device__ __forceinline__ Span(int count, int of, int many)
        : first(static_cast<int>(static_cast<uint32_t>(of * count) / many)),
          last(static_cast<int>(static_cast<uint32_t>((of + 1) * count) / many)) {}
};

// How the attention is cut. A rank has a quarter of the prefix's keys and of the suffix's; a cluster has some of the packed
// query rows (row r is head r % heads of token r / heads), in groups.
struct Cut {
    int first_key, keys, pieces, columns;  // of the prefix; columns: of the scores, suffix included
    int first_suffix, suffix_keys;
    int first_row, last_row, group;
    __device__ __forceinline__ Cut(const PersistentArgs& a, int prefix, int rank, int cluster, int clusters) {
        const int each = ((prefix + kRanks - 1) / kRanks + 7) / 8 * 8;
        first_key = min(rank * each, prefix);
        keys = min(first_key + each, prefix) - first_key;
        pieces = (keys + kKeys - 1) / kKeys;
        columns = pieces * kKeys + 16;
        const int own = (a.suffix + kRanks - 1) / kRanks;
        first_suffix = min(rank * own, a.suffix);
        suffix_keys = min(first_suffix + own, a.suffix) - first_suffix;
        const Span rows(a.rows * kHeads, cluster, clusters);
        first_row = rows.first, last_row = rows.last;
        // The same on every rank of a cluster.
        group = (each + kKeys - 1) / kKeys * kKeys + 16 <= 200 ? 32 : 16;
    }
};

// The attention's buffers in `acts`.
struct Buffers {
    uint8_t *queries, *keys, *values;  // rows of kRow bytes
    float* inbox;                      // [ranks][head_dim/8][rows of a rank][8]
    float2* inbox_stats;               // [ranks][rows of a rank] maximum and sum
    float2* stats;                     // [group]
    float* scores;                     // [group][columns + 4]
    bf16* weights;                     // [group][columns + 8]
    __device__ __forceinline__ Buffers(uint8_t* acts, const Cut& c) {
        queries = acts;
        keys = queries + c.group * kRow;
        values = keys + 16 * kRow;
        inbox = reinterpret_cast<float*>(values + 16 * kRow);
        inbox_stats = reinterpret_cast<float2*>(inbox + c.group * kHead);
        stats = inbox_stats + c.group;
        scores = reinterpret_cast<float*>(stats + c.group);
        weights = reinterpret_cast<bf16*>(scores + c.group * (c.columns + 4));
    }
};

struct Ring {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == kStages) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void skip(int n) {
        for (; n > 0; n--) next();
    }
};

// --- The warp that keeps the ring filled.

// The tiles of a product that fall to one of several, in units that are nearly equal.
struct Tiles {
    Span all;
    int units;
    __device__ __forceinline__ Tiles(int count, int most, int of, int many)
        : all(count, of, many), units((all.last - all.first + most - 1) / most) {}
    __device__ __forceinline__ Span of(int unit) const {
        Span s(all.last - all.first, unit, units);
        s.first += all.first, s.last += all.first;
        return s;
    }
};

// Goes through a block's weights in the order of their use, step after step: T once, then QKV, O, gate/up and down.
struct Walk {
    const PersistentArgs& a;
    const LayerArgs* layers;
    Tiles narrow, qkv, wide;
    int rank, layer = 0, product, unit = 0, piece = 0;

    __device__ __forceinline__ Walk(const PersistentArgs& a, const LayerArgs* layers, int rank, int cluster, int clusters)
        : a(a), layers(layers), narrow(kWidthTiles, kNarrow, cluster, clusters), qkv(kQkvTiles, kQkv, cluster, clusters),
          wide(kMlpTiles, kWide, blockIdx.x, gridDim.x), rank(rank), product(a.time_w ? 0 : 1) {
        settle();
    }
    __device__ __forceinline__ const Tiles& tiles() const { return product == 1 ? qkv : product == 3 ? wide : narrow; }
    // Pieces of a unit, and chunks of a piece.
    __device__ __forceinline__ int pieces() const { return product == 0 ? 1 : product < 3 ? 2 : product == 3 ? 8 : 4; }
    __device__ __forceinline__ int chunks() const { return product == 1 || product == 3 ? 1 : 2; }
    // Where the first chunk of the piece lies, the bytes of a chunk, and elements to the second.
    __device__ __forceinline__ const bf16* at(uint32_t& bytes, size_t& apart) const {
        const LayerArgs& l = layers[layer];
        const bf16* w = product == 0 ? a.time_w : product == 1 ? l.qkv : product == 2 ? l.out : product == 3 ? l.gate_up : l.down;
        const int count = product == 1 ? kQkvTiles : product == 3 ? kMlpTiles : kWidthTiles;
        const Span span = tiles().of(unit);
        bytes = (span.last - span.first) * kTile;
        apart = static_cast<size_t>(count) * (kTile / 2);
        return w + static_cast<size_t>((product == 3 ? 0 : rank * pieces()) + piece) * chunks() * apart + span.first * (kTile / 2);
    }
    __device__ __forceinline__ void settle() {
        while (unit >= tiles().units) {
            unit = 0;
            if (++product < 5) continue;
            product = 1;
            if (++layer == a.layer_count) layer = 0, product = a.time_w ? 0 : 1;
        }
    }
    __device__ __forceinline__ void next() {
        if (++piece < pieces()) return;
        piece = 0, unit++;
        settle();
    }
};

struct Producer {
    const PersistentArgs& a;
    Shared& s;
    int lane;
    uint64_t policy;
    Ring ring;
    Walk walk;

    __device__ __forceinline__ Producer(const PersistentArgs& a, Shared& s, int rank, int cluster, int clusters)
        : a(a), s(s), lane(threadIdx.x % 32), walk(a, s.layers, rank, cluster, clusters) {
        // Weights pass once a step, keys and values of the prefix ten times: those shall stay in L2.
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        ring.parity = 1;
    }
    // The next `pieces` pieces of weights.
    __device__ __forceinline__ void weights(int pieces) {
        for (int i = 0; i < pieces; i++, ring.next()) {
            uint32_t bytes;
            size_t apart;
            const bf16* from = walk.at(bytes, apart);
            const int chunks = walk.chunks();
            uint64_t* full = &s.full[ring.slot];
            barrier_wait(&s.empty[ring.slot], ring.parity);
            barrier_expect(full, bytes * chunks);
            for (int c = 0; c < chunks; c++)
                asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                                 smem_address(s.ring[ring.slot] + c * kNarrow * kTile)),
                             "l"(from + c * apart), "r"(bytes), "r"(smem_address(full)), "l"(policy)
                             : "memory");
            walk.next();
        }
    }
    __device__ __forceinline__ void rows(const bf16* from, int count) {
        for (int i = 0; i < count; i += kKeys, ring.next()) {
            uint64_t* full = &s.full[ring.slot];
            const uint32_t bytes = min(kKeys, count - i) * kRow;
            barrier_wait(&s.empty[ring.slot], ring.parity);
            barrier_expect(full, bytes);
            copy_bulk(s.ring[ring.slot], from + static_cast<size_t>(i) * (kRow / 2), bytes, full);
        }
    }
    __device__ __forceinline__ void run(int rank, int cluster, int clusters) {
        if (lane != 0 || a.layer_count == 0) return;
        const Cut cut(a, a.params->prefix, rank, cluster, clusters);
        const int narrow = walk.narrow.units;
        if (a.time_w) weights(narrow);
        for (int l = 0; l < a.layer_count; l++) {
            weights(2 * walk.qkv.units);
            const size_t at = l * a.params->layer_stride + static_cast<size_t>(cut.first_key) * (kRow / 2);
            for (int r = cut.first_row; r < cut.last_row; r += cut.group) {
                rows(a.params->keys + at, cut.keys);
                rows(a.params->values + at, cut.keys);
            }
            weights(2 * narrow);
            weights(8 * walk.wide.units);
            weights(4 * narrow);
        }
    }
};

// --- The warp that waits at the barriers and brings activations.

struct Loader {
    const PersistentArgs& a;
    Shared& s;
    int lane;
    uint32_t target, groups = 0;

    __device__ __forceinline__ Loader(const PersistentArgs& a, Shared& s)
        : a(a), s(s), lane(threadIdx.x % 32), target(a.barriers * gridDim.x) {}

    // Until every block has finished the phase. One that does not come means that blocks are not all on the chip.
    __device__ __forceinline__ void wait() {
        target += gridDim.x;
        if (lane == 0) {
            uint32_t seen;
            uint64_t start = 0, now;
            for (uint32_t spins = 0;; spins++) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.arrived) : "memory");
                if (static_cast<int32_t>(seen - target) >= 0) break;
                if ((spins & 4095) != 4095) continue;
                asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
                if (start == 0) start = now;
                if (now - start < kPatience) continue;
                *reinterpret_cast<volatile uint32_t*>(a.error) = 1;
                __threadfence_system();
                __trap();
            }
            fence_async();
        }
        __syncwarp();
    }
    // `k` of K from number `first` such slice of a panel on, a quarter at each barrier.
    __device__ __forceinline__ void slice(const bf16* panel, int k, int first) {
        if (lane != 0) return;
        const uint32_t bytes = k / 32 * kOctet;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(panel) + static_cast<size_t>(first) * 4 * bytes;
        for (int c = 0; c < 4; c++) {
            barrier_expect(&s.acts_full[c], bytes);
            copy_bulk(s.acts + c * bytes, from + c * bytes, bytes, &s.acts_full[c]);
        }
    }
    __device__ __forceinline__ void attention(const Cut& c, int layer) {
        const Buffers b(s.acts, c);
        const size_t at = (static_cast<size_t>(layer) * a.suffix + c.first_suffix) * kHead;
        for (int r = c.first_row; r < c.last_row; r += c.group, groups++) {
            const int here = min(c.group, c.last_row - r);
            if (groups) barrier_wait(&s.queries_free, (groups - 1) & 1);
            const bool first = r == c.first_row;
            if (lane == 0) barrier_expect(&s.queries_full, (here + (first ? 2 * c.suffix_keys : 0)) * kHead * 2);
            __syncwarp();
            if (lane < here) copy_bulk(b.queries + lane * kRow, a.q + static_cast<size_t>(r + lane) * kHead, kHead * 2, &s.queries_full);
            if (first && lane < c.suffix_keys) {
                copy_bulk(b.keys + lane * kRow, a.suffix_keys + at + lane * kHead, kHead * 2, &s.queries_full);
                copy_bulk(b.values + lane * kRow, a.suffix_values + at + lane * kHead, kHead * 2, &s.queries_full);
            }
        }
    }
    __device__ __forceinline__ void run(int rank, int cluster, int clusters) {
        const Cut cut(a, a.params->prefix, rank, cluster, clusters);
        if (a.time_w) slice(a.u, kWidth / kRanks, rank);
        for (int l = 0; l < a.layer_count; l++) {
            if (l || a.time_w) wait();
            slice(a.hb, kWidth / kRanks, rank);
            wait();
            attention(cut, l);
            wait();
            slice(a.attended, kAttention / kRanks, rank);
            wait();
            slice(a.hb, kWidth, 0);
            wait();
            slice(a.gated, kMlp / kRanks, rank);
        }
    }
};

// --- The warps that compute.

struct Compute {
    const PersistentArgs& a;
    Shared& s;
    const int tid, lane, warp, wg, rank, cluster, clusters, prefix;  // tid: within the warpgroup; warp: likewise
    Ring ring;
    uint32_t acts_parity = 0, inbox_parity = 0, groups = 0, phases = 0;

    __device__ __forceinline__ Compute(const PersistentArgs& a, Shared& s, int rank, int cluster, int clusters)
        : a(a), s(s), tid(threadIdx.x % 128), lane(threadIdx.x % 32), warp(of_warp(threadIdx.x % 128 / 32)), wg(of_warp(threadIdx.x / 128)),
          rank(rank), cluster(cluster), clusters(clusters), prefix(a.params->prefix) {}

    __device__ __forceinline__ void begin() {
        if (a.delay > 0) {
            uint32_t z = (blockIdx.x * 2654435761u) ^ (++phases * 0x9e3779b9u) ^ static_cast<uint32_t>(a.delay) ^ (a.barriers * 40503u);
            z ^= z >> 16, z *= 0x7feb352du, z ^= z >> 15, z *= 0x846ca68bu, z ^= z >> 16;
            __nanosleep(z % static_cast<uint32_t>(a.delay));
        }
    }
    // This block has finished a phase: what it wrote is there for whoever sees the count.
    __device__ __forceinline__ void done() {
        meet(1, kComputing);
        if (threadIdx.x == 0 && !(a.delay < 0 && blockIdx.x == 0))
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.arrived) : "memory");
    }

    // Units of a phase are multiplied one after the other, by turns of the warpgroups: whoever is far from the head of the
    // ring could not tell one round of it from the next. The first two may go together where they fit the ring.
    __device__ __forceinline__ static bool by_turns(int unit, int pieces) { return unit > 1 || (unit == 1 && 2 * pieces > kStages); }
    __device__ __forceinline__ void take_turn(int unit, int pieces) {
        if (by_turns(unit, pieces)) meet(4 + unit % 2, kComputing);
    }
    __device__ __forceinline__ void pass_turn(int unit, int units, int pieces) {
        if (unit + 1 < units && by_turns(unit + 1, pieces)) asm volatile("bar.arrive %0, %1;" ::"r"(4 + (unit + 1) % 2), "r"(kComputing) : "memory");
    }

    // acc = tokens · weights over SLICE of K, in pieces of CHUNKS chunks, and as many columns as `acc` holds.
    template <int SLICE, int CHUNKS, int REGS>
    __device__ __forceinline__ void product(float (&acc)[REGS]) {
        constexpr int kQuarter = SLICE / 4, kPiece = CHUNKS * kChunk;
        const uint64_t x = operand(of_warp(smem_address(s.acts)), kOctet, 128);
        uint32_t before = 0;
#pragma unroll
        for (int i = 0; i < REGS; i++) acc[i] = 0.0f;
#pragma unroll 1
        for (int p = 0; p < SLICE / kPiece; p++) {
            barrier_wait(&s.full[ring.slot], ring.parity);
            const uint64_t w = operand(of_warp(smem_address(s.ring[ring.slot])), 128, kTile);
            const uint64_t here = x + p * (kPiece / 8 * kOctet >> 4);
#pragma unroll
            for (int c = 0; c < (kPiece + kQuarter - 1) / kQuarter; c++) barrier_wait(&s.acts_full[p * kPiece / kQuarter + c], acts_parity);
            mma_begin();
#pragma unroll
            for (int k = 0; k < kPiece / 16; k++) mma(acc, here + (k * 2 * kOctet >> 4), w + (k / 8 * kNarrow * kTile + k % 8 * 256 >> 4));
            mma_commit();
            if (p > 0) {
                mma_wait<1>();
                if (lane == 0) barrier_arrive(&s.empty[before], 2);
            }
            before = ring.slot;
            ring.next();
        }
        mma_wait<0>();
        if (lane == 0) barrier_arrive(&s.empty[before], 2);
    }

    // This rank's sums of `tiles` tiles to the ranks that finish them, by token row.
    template <int REGS>
    __device__ __forceinline__ void send_sums(const float (&acc)[REGS], int tiles) {
        const int g = lane / 4, t = lane % 4, odd = t & 1;
        const int row = warp * 16 + g + 8 * odd;  // even lanes take the upper row of a pair of lanes, odd ones the lower
        const int to_rank = min(row / kOwn, kRanks - 1);
        const uint32_t to = remote_address(&s.inbox[wg][rank][0][row % kOwn][(t / 2) * 4], to_rank), barrier = remote_address(&s.received[wg], to_rank);
#pragma unroll
        for (int j = 0; j < REGS / 4; j++) {
            const float* c = acc + 4 * j;
            const float x = __shfl_xor_sync(0xffffffffu, odd ? c[0] : c[2], 1), y = __shfl_xor_sync(0xffffffffu, odd ? c[1] : c[3], 1);
            const float4 v = odd ? make_float4(x, y, c[2], c[3]) : make_float4(c[0], c[1], x, y);
            if (j < tiles && row < kOwn * kRanks) send(to + j * (kOwn * 32), v, barrier);
        }
    }
    // The ranks' sums of two neighbouring columns.
    __device__ __forceinline__ float2 sums(int tile, int own, int column) const {
        float2 v = {};
#pragma unroll
        for (int c = 0; c < kRanks; c++) {
            const float2 p = *reinterpret_cast<const float2*>(&s.inbox[wg][c][tile][own][column]);
            v.x += p.x, v.y += p.y;
        }
        return v;
    }

    // Sums of squares of a token row by tile, over LANES neighbouring lanes; all of them get 1/rms.
    template <int LANES>
    struct Squares {
        float4 parts[kWidthTiles / 4 / LANES];
        __device__ __forceinline__ void load(const float* squares, int row, int part) {
#pragma unroll
            for (int i = 0; i < kWidthTiles / 4 / LANES; i++)
                parts[i] = __ldcg(reinterpret_cast<const float4*>(squares + row * kWidthTiles) + i * LANES + part);
        }
        __device__ __forceinline__ float inverse_rms(float inv_width) const {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kWidthTiles / 4 / LANES; i++) sum += (parts[i].x + parts[i].y) + (parts[i].z + parts[i].w);
#pragma unroll
            for (int o = 1; o < LANES; o <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            return rsqrtf(sum * inv_width + kEps);
        }
    };

    // A product split over the cluster. prepare(tiles): operands of the end, on their way while the product runs; finish(tiles,
    // operands): adds the ranks' sums of 13 rows.
    template <int SLICE, int MOST, int CHUNKS, class Prepare, class Finish>
    __device__ __forceinline__ void split(int count, Prepare prepare, Finish finish) {
        begin();
        constexpr int kPieces = SLICE / (CHUNKS * kChunk);
        const Tiles tiles(count, MOST, cluster, clusters);
#pragma unroll 1
        for (int u = 0; u < tiles.units; u++) {
            if (u % 2 != wg) {
                ring.skip(kPieces);
                continue;
            }
            const Span span = tiles.of(u);
            if (tid == 0) barrier_expect(&s.received[wg], kRanks * kOwn * 32 * (span.last - span.first));
            // The first activations are there: so is all that the phase before wrote.
            barrier_wait(&s.acts_full[0], acts_parity);
            const auto operands = prepare(span);
            float acc[4 * MOST];
            take_turn(u, kPieces);
            product<SLICE, CHUNKS>(acc);
            pass_turn(u, tiles.units, kPieces);
            // The ranks have taken what was in their inboxes before.
            barrier_wait(&s.inbox_free[wg], inbox_parity ^ 1);
            send_sums(acc, span.last - span.first);
            barrier_wait(&s.received[wg], inbox_parity);
            finish(span, operands);
            meet(2 + wg, 128);
            if (tid < kRanks) barrier_arrive_remote(remote_address(&s.inbox_free[wg], tid));
            inbox_parity ^= 1;
        }
        acts_parity ^= 1;
    }

    // Eight lanes a row, two columns a lane: the operands and the end of up to six tiles, two at a time.
    static constexpr int kRounds = 3;

    struct ResidualOperands {
        float2 old[kRounds], scale[kRounds], gate[kRounds];
    };
    // h (+)= sums, and what the next norm needs of it. `init`: h = sums + bias, `gate` being the bias.
    template <int SLICE>
    __device__ __forceinline__ void residual(const float* scale, const float* gate, bool init) {
        const int own = tid / 8, part = tid % 8, n = rank * kOwn + own, column = part % 4 * 2;
        const bool valid = own < kOwn && n < (init ? a.horizon : a.rows);
        auto load2 = [](const float* p) { return *reinterpret_cast<const float2*>(p); };
        split<SLICE, kNarrow, 2>(
            kWidthTiles,
            [&](Span tiles) {
                ResidualOperands r = {};
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int tile = tiles.first + 2 * i + part / 4, m = tile * 8 + column;
                    if (!valid || tile >= tiles.last) continue;
                    r.scale[i] = load2(scale + m);
                    r.gate[i] = gate ? load2(gate + m) : init ? make_float2(0, 0) : make_float2(1, 1);
                    if (!init) r.old[i] = load2(a.h + n * kWidth + m);
                }
                return r;
            },
            [&](Span tiles, const ResidualOperands& r) {
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int j = 2 * i + part / 4, tile = tiles.first + j, m = tile * 8 + column;
                    const bool mine = valid && tile < tiles.last;
                    float squares = 0.0f;
                    if (mine) {
                        float2 v = sums(j, own, column);
                        v = init ? make_float2(v.x + r.gate[i].x, v.y + r.gate[i].y)
                                 : make_float2(v.x * r.gate[i].x + r.old[i].x, v.y * r.gate[i].y + r.old[i].y);
                        *reinterpret_cast<float2*>(a.h + n * kWidth + m) = v;
                        *reinterpret_cast<uint32_t*>(a.hb + panel(n, m, kPanelRows)) = pack_bf16(v.x * r.scale[i].x, v.y * r.scale[i].y);
                        squares = v.x * v.x + v.y * v.y;
                    }
                    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
                    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
                    if (mine && part % 4 == 0) a.squares[n * kWidthTiles + tile] = squares;
                }
            });
    }

    struct QkvOperands {
        float2 bias[kRounds], turn[kRounds];
        Squares<8> squares;
    };
    // Columns 2p and 2p+1 are pair p of the rotation.
    __device__ __forceinline__ void qkv(const LayerArgs& w, int layer) {
        const int own = tid / 8, part = tid % 8, n = rank * kOwn + own;
        const bool valid = own < kOwn && n < a.rows;
        const int key = n == a.horizon ? 0 : a.has_state + n;
        split<kWidth / kRanks, kQkv, 1>(
            kQkvTiles,
            [&](Span tiles) {
                QkvOperands r;
                r.squares.load(a.squares, min(n, 63), part);
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int tile = tiles.first + 2 * i + part / 4, pair = tile * 4 + part % 4;
                    const bool mine = valid && tile < tiles.last;
                    r.turn[i] = r.bias[i] = make_float2(0.0f, 0.0f);
                    if (mine && pair / (kHead / 2) <= kHeads) r.turn[i] = a.rope[(prefix + key) * (kHead / 2) + pair % (kHead / 2)];
                    if (mine && w.qkv_bias) r.bias[i] = *reinterpret_cast<const float2*>(w.qkv_bias + 2 * pair);
                }
                return r;
            },
            [&](Span tiles, const QkvOperands& r) {
                const float rinv = r.squares.inverse_rms(a.inv_width);
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int j = 2 * i + part / 4, tile = tiles.first + j, pair = tile * 4 + part % 4;
                    if (!valid || tile >= tiles.last) continue;
                    float2 v = sums(j, own, part % 4 * 2);
                    v = make_float2(v.x * rinv + r.bias[i].x, v.y * rinv + r.bias[i].y);
                    const int head = pair / (kHead / 2), d = pair % (kHead / 2);
                    const float2 c = r.turn[i];
                    if (head <= kHeads) v = make_float2(v.x * c.x - v.y * c.y, v.y * c.x + v.x * c.y);
                    const size_t at = (static_cast<size_t>(layer) * a.suffix + key) * kHead;
                    bf16* to = head < kHeads ? a.q + (n * kHeads + head) * kHead : (head == kHeads ? a.suffix_keys : a.suffix_values) + at;
                    to[d] = __float2bfloat16(v.x), to[d + kHead / 2] = __float2bfloat16(v.y);
                }
            });
    }

    // gelu(gate)·up, all of K in this block; a tile's columns are a gate and its up by turns.
    __device__ __forceinline__ void gate_up(const LayerArgs& w) {
        begin();
        const int g = lane / 4, t = lane % 4, odd = t & 1;
        const Tiles tiles(kMlpTiles, kWide, blockIdx.x, gridDim.x);
        if (wg == 1) {
            // While the other warpgroup multiplies. The first activations are there: so are the sums of squares.
            barrier_wait(&s.acts_full[0], acts_parity);
            Squares<2> squares;
            squares.load(a.squares, tid / 2, tid % 2);
            s.inverse_rms[tid / 2] = squares.inverse_rms(a.inv_width);
            meet(3, 128);
            asm volatile("bar.arrive 6, %0;" ::"n"(kComputing) : "memory");
        }
#pragma unroll 1
        for (int u = 0; u < tiles.units; u++) {
            if (u % 2 != wg) {
                ring.skip(kWidth / kChunk);
                continue;
            }
            const Span span = tiles.of(u);
            float2 bias[kWide];
#pragma unroll
            for (int j = 0; j < kWide; j++) {
                bias[j] = make_float2(0.0f, 0.0f);
                if (w.gate_up_bias && span.first + j < span.last) bias[j] = *reinterpret_cast<const float2*>(w.gate_up_bias + (span.first + j) * 8 + 2 * t);
            }
            float acc[4 * kWide];
            take_turn(u, kWidth / kChunk);
            product<kWidth, 1>(acc);
            pass_turn(u, tiles.units, kWidth / kChunk);
            if (u == 0) meet(6, kComputing);
            const float rinv[2] = {s.inverse_rms[warp * 16 + g], s.inverse_rms[warp * 16 + g + 8]};
            // Even lanes collect two neighbours of the upper row, odd ones of the lower.
            const int n = warp * 16 + g + 8 * odd;
#pragma unroll
            for (int j = 0; j < kWide; j++) {
                const float upper = gelu_tanh(acc[4 * j] * rinv[0] + bias[j].x) * (acc[4 * j + 1] * rinv[0] + bias[j].y);
                const float lower = gelu_tanh(acc[4 * j + 2] * rinv[1] + bias[j].x) * (acc[4 * j + 3] * rinv[1] + bias[j].y);
                const float other = __shfl_xor_sync(0xffffffffu, odd ? upper : lower, 1);
                const uint32_t pair = odd ? pack_bf16(other, lower) : pack_bf16(upper, other);
                const int tile = span.first + j;
                if (n < a.rows && tile < span.last) *reinterpret_cast<uint32_t*>(a.gated + panel(n, tile * 4 + (t / 2) * 2, kPanelRows)) = pair;
            }
        }
        acts_parity ^= 1;
    }

    // 16 query rows as operands.
    struct Queries {
        uint32_t f[kHead / 16][4];
        __device__ __forceinline__ void load(const uint8_t* rows, int lane) {
#pragma unroll
            for (int k = 0; k < kHead / 16; k++) ldmatrix_x4(f[k], rows + (lane % 16) * kRow + k * 32 + (lane / 16) * 16);
        }
    };
    // Scores of 8 keys against 16 query rows, to `to` of the first row.
    __device__ __forceinline__ void scores(const Queries& q, const uint8_t* keys, float* to, int stride) {
        const int g = lane / 4, t = lane % 4;
        float d[4][4] = {};
        uint32_t k8[kHead / 32][4];
#pragma unroll
        for (int k = 0; k < kHead / 32; k++) ldmatrix_x4(k8[k], keys + (lane % 8) * kRow + (lane / 8) * 16 + k * 64);
#pragma unroll
        for (int k = 0; k < kHead / 16; k++) mma_16816(d[k % 4], q.f[k][0], q.f[k][1], q.f[k][2], q.f[k][3], k8[k / 2][k % 2 * 2], k8[k / 2][k % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 4; i++) d[0][i] = (d[0][i] + d[1][i]) + (d[2][i] + d[3][i]);
        to += g * stride + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(d[0][0], d[0][1]);
        *reinterpret_cast<float2*>(to + 8 * stride) = make_float2(d[0][2], d[0][3]);
    }

    // Softmax over this rank's keys, LANES lanes a row. The state row sees the prefix and itself only.
    template <int LANES>
    __device__ __forceinline__ void softmax(const Buffers& b, const Cut& c, int row0) {
        const int r = threadIdx.x / LANES, part = threadIdx.x % LANES, suffix = c.pieces * kKeys;
        const uint32_t keys = c.keys, visible = (row0 + r) / kHeads == a.horizon ? min(max(1 - c.first_suffix, 0), c.suffix_keys) : c.suffix_keys;
        const float* row = b.scores + r * (c.columns + 4);
        bf16* to = b.weights + r * (c.columns + 8);
        auto score = [&](int k) {
            const float v = row[k] * a.scale;
            return static_cast<uint32_t>(k) < keys || static_cast<uint32_t>(k - suffix) < visible ? v : -INFINITY;
        };
        float top = -INFINITY, sum = 0.0f;
        auto over_row = [&](auto each) {
            if (c.columns <= 256) {
#pragma unroll
                for (int i = 0; i < 256 / LANES; i++)
                    if (part + i * LANES < c.columns) each(part + i * LANES);
            } else {
                for (int k = part; k < c.columns; k += LANES) each(k);
            }
        };
        over_row([&](int k) { top = fmaxf(top, score(k)); });
#pragma unroll
        for (int m = 1; m < LANES; m <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
        const float base = top == -INFINITY ? 0.0f : top;
        over_row([&](int k) {
            const bf16 p = __float2bfloat16(exp2_fast(score(k) - base));
            sum += __bfloat162float(p);
            to[k] = p;
        });
#pragma unroll
        for (int m = 1; m < LANES; m <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
        if (part == 0) b.stats[r] = make_float2(top, sum);
    }

    // o += weights · values for 16·STEPS keys and this warp's 32 dimensions.
    template <int STEPS>
    __device__ __forceinline__ void weigh(float (&o)[2][4][4], const Buffers& b, const Cut& c, const uint8_t* values, int column, int tiles, int dims) {
        uint32_t v[STEPS][2][4], p[STEPS][2][4];
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
#pragma unroll
            for (int h = 0; h < 2; h++) ldmatrix_x4_trans(v[k][h], values + (k * 16 + lane % 16) * kRow + (dims + h * 16 + (lane / 16) * 8) * 2);
            const bf16* row = b.weights + (lane % 16) * (c.columns + 8) + column + k * 16 + (lane / 16) * 8;
            ldmatrix_x4(p[k][0], row);
            if (tiles > 1) ldmatrix_x4(p[k][1], row + 16 * (c.columns + 8));
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                mma_16816(o[0][j], p[k][0][0], p[k][0][1], p[k][0][2], p[k][0][3], v[k][j / 2][j % 2 * 2], v[k][j / 2][j % 2 * 2 + 1]);
                if (tiles > 1) mma_16816(o[1][j], p[k][1][0], p[k][1][1], p[k][1][2], p[k][1][3], v[k][j / 2][j % 2 * 2], v[k][j / 2][j % 2 * 2 + 1]);
            }
    }

    __device__ __forceinline__ void attention() {
        begin();
        const Cut c(a, prefix, rank, cluster, clusters);
        const Buffers b(s.acts, c);
        const int all = threadIdx.x, w8 = of_warp(all / 32), g = lane / 4, t = lane % 4, odd = t & 1;
        // Values of keys that are not there have no weight, but must be numbers.
        for (int i = all; i < (16 - c.suffix_keys) * (kHead / 8); i += kComputing)
            store_zero_16(b.values + (c.suffix_keys + i / (kHead / 8)) * kRow + i % (kHead / 8) * 16);
#pragma unroll 1
        for (int row0 = c.first_row; row0 < c.last_row; row0 += c.group, groups++) {
            const uint32_t parity = groups & 1;
            const int here = min(c.group, c.last_row - row0), tiles = here > 16 ? 2 : 1, each = tiles * 4;  // each: rows a rank joins
            if (all == 0) barrier_expect(&s.parts_received, kRanks * each * (kHead * 4 + 8));
            barrier_wait(&s.queries_full, parity);
            const int stride = c.columns + 4, end = c.pieces * kKeys;
            {
                // 16 rows stay in registers, more are read anew for each piece.
                Queries q;
                if (tiles == 1) q.load(b.queries, lane);
#pragma unroll 1
                for (int p = 0; p < c.pieces; p++, ring.next()) {
                    if (p % 2 != wg) continue;
                    barrier_wait(&s.full[ring.slot], ring.parity);
#pragma unroll 1
                    for (int m = 0; m < tiles; m++) {
                        if (tiles > 1) q.load(b.queries + m * 16 * kRow, lane);
                        scores(q, s.ring[ring.slot] + warp * 8 * kRow, b.scores + m * 16 * stride + p * kKeys + warp * 8, stride);
                    }
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&s.empty[ring.slot], 2);
                }
                // The suffix: the warpgroup that had fewer pieces takes it.
                if (wg == 1 && warp / 2 < tiles) {
                    if (tiles > 1) q.load(b.queries + warp / 2 * 16 * kRow, lane);
                    scores(q, b.keys + warp % 2 * 8 * kRow, b.scores + warp / 2 * 16 * stride + end + warp % 2 * 8, stride);
                }
            }
            meet(1, kComputing);
            if (all == 0) barrier_arrive(&s.queries_free, 1);
            if (tiles == 1)
                softmax<16>(b, c, row0);
            else
                softmax<8>(b, c, row0);
            meet(1, kComputing);
            float o[2][4][4] = {};
#pragma unroll 1
            for (int p = 0; p < c.pieces; p++, ring.next()) {
                barrier_wait(&s.full[ring.slot], ring.parity);
                if (p * kKeys + 16 < c.keys)
                    weigh<2>(o, b, c, s.ring[ring.slot], p * kKeys, tiles, w8 * 32);
                else
                    weigh<1>(o, b, c, s.ring[ring.slot], p * kKeys, tiles, w8 * 32);
                __syncwarp();
                if (lane == 0) barrier_arrive(&s.empty[ring.slot], 1);
            }
            weigh<1>(o, b, c, b.values, end, tiles, w8 * 32);
            // The ranks have joined the group before.
            barrier_wait(&s.parts_free, parity ^ 1);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                if (m >= tiles) break;
                const int row = m * 16 + g + 8 * odd;
                const uint32_t to = remote_address(b.inbox + ((rank * (kHead / 8) + w8 * 4) * each + row % each) * 8 + (t / 2) * 4, row / each);
                const uint32_t barrier = remote_address(&s.parts_received, row / each);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float* d = o[m][j];
                    const float x = __shfl_xor_sync(0xffffffffu, odd ? d[0] : d[2], 1), y = __shfl_xor_sync(0xffffffffu, odd ? d[1] : d[3], 1);
                    send(to + j * each * 32, odd ? make_float4(x, y, d[2], d[3]) : make_float4(d[0], d[1], x, y), barrier);
                }
            }
            if (all < 16 * tiles)
                send(remote_address(b.inbox_stats + rank * each + all % each, all / each), b.stats[all], remote_address(&s.parts_received, all / each));
            barrier_wait(&s.parts_received, parity);
            for (int i = all; i < each * (kHead / 4); i += kComputing) {
                const int r = i / (kHead / 4), d = i % (kHead / 4) * 4, row = row0 + rank * each + r;
                if (rank * each + r >= here) continue;
                float top = -INFINITY;
#pragma unroll
                for (int k = 0; k < kRanks; k++) top = fmaxf(top, b.inbox_stats[k * each + r].x);
                float4 v = {};
                float sum = 0.0f;
#pragma unroll
                for (int k = 0; k < kRanks; k++) {
                    const float2 part = b.inbox_stats[k * each + r];
                    const float4 p = load4(b.inbox + ((k * (kHead / 8) + d / 8) * each + r) * 8 + d % 8);
                    const float f = part.x == -INFINITY ? 0.0f : exp2_fast(part.x - top);
                    sum += f * part.y;
                    if (f != 0.0f) v.x += f * p.x, v.y += f * p.y, v.z += f * p.z, v.w += f * p.w;
                }
                const float inv = 1.0f / sum;
                *reinterpret_cast<uint2*>(a.attended + panel(row / kHeads, row % kHeads * kHead + d, kPanelRows)) =
                    pack_bf16x4(make_float4(v.x * inv, v.y * inv, v.z * inv, v.w * inv));
            }
            meet(1, kComputing);
            if (all < kRanks) barrier_arrive_remote(remote_address(&s.parts_free, all));
        }
        // Copies of the next phase overwrite what was written here.
        fence_async();
    }

    __device__ __forceinline__ void run() {
        if (a.time_w) {
            residual<kWidth / kRanks>(a.first_scale, a.time_bias, true);
            done();
        }
#pragma unroll 1
        for (int l = 0; l < a.layer_count; l++) {
            const LayerArgs& w = s.layers[l];
            qkv(w, l);
            done();
            attention();
            done();
            residual<kAttention / kRanks>(w.mid_scale, w.mid_gate, false);
            done();
            gate_up(w);
            done();
            residual<kMlp / kRanks>(w.end_scale, w.end_gate, false);
            if (l + 1 < a.layer_count) done();
        }
    }
};

__device__ __forceinline__ void whole_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

#endif

// grid: clusters·4 blocks that are all on the chip at once.
extern "C" __global__ void __launch_bounds__(kThreads, 1) persistent_step(const __grid_constant__ PersistentArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    Shared& s = *reinterpret_cast<Shared*>(shared_memory);
    const int rank = blockIdx.x % kRanks, cluster = blockIdx.x / kRanks, clusters = gridDim.x / kRanks;
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(s.ring) / 16); i += kThreads) store_zero_16(s.ring[0] + i * 16);
    for (int i = threadIdx.x; i < a.layer_count * static_cast<int>(sizeof(LayerArgs) / 8); i += kThreads)
        reinterpret_cast<uint64_t*>(s.layers)[i] = reinterpret_cast<const uint64_t*>(a.layers)[i];
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) barrier_init_n(&s.full[i], 1), barrier_init_n(&s.empty[i], 8);
        for (int i = 0; i < 4; i++) barrier_init_n(&s.acts_full[i], 1);
        for (int i = 0; i < 2; i++) barrier_init_n(&s.received[i], 1), barrier_init_n(&s.inbox_free[i], kRanks);
        barrier_init_n(&s.queries_full, 1), barrier_init_n(&s.queries_free, 1);
        barrier_init_n(&s.parts_received, 1), barrier_init_n(&s.parts_free, kRanks);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    fence_async();
    whole_cluster();
    const int role = of_warp(threadIdx.x / 32);
    if (role < kComputing / 32)
        Compute(a, s, rank, cluster, clusters).run();
    else if (role == kComputing / 32)
        Producer(a, s, rank, cluster, clusters).run(rank, cluster, clusters);
    else
        Loader(a, s).run(rank, cluster, clusters);
    __syncwarp();
    // Nobody leaves while others may still send to it.
    whole_cluster();
#endif
}
