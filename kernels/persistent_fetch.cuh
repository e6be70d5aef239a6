// The two warps of the persistent decoder that fetch.
#pragma once
#include "persistent.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// --- The warp that keeps the ring filled.

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

#endif
