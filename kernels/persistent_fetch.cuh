// The two warps of the persistent decoder that fetch.
#pragma once
#include "persistent.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// --- The warp that keeps the ring filled.

template <class U>
struct Producer {
    const PersistentArgs& a;
    Shared<U>& s;
    int lane;
    uint64_t policy;  // weights pass once a step, keys and values of the prefix ten times: those shall stay in L2
    Ring<U::kStages> ring;

    __device__ __forceinline__ Producer(const PersistentArgs& a, Shared<U>& s) : a(a), s(s), lane(threadIdx.x % 32), policy(passing()) {
        ring.parity = 1;
    }
    // A product's weights, packed for `count` tiles: of each of this block's units `pieces` pieces of `chunks` chunks, from
    // chunk `first` on.
    __device__ __forceinline__ void weights(const bf16* packed, int count, const Tiles& tiles, int pieces, int chunks, int first) {
        const size_t apart = static_cast<size_t>(count) * (kTile / 2);  // elements from a chunk to the next
#pragma unroll 1
        for (int u = 0; u < tiles.units; u++) {
            const Span span = tiles.of(u);
            const uint32_t bytes = (span.last - span.first) * kTile;
            const bf16* from = packed + first * apart + span.first * (kTile / 2);
#pragma unroll 1
            for (int p = 0; p < pieces; p++, ring.next()) {
                uint64_t* full = &s.full[ring.slot];
                barrier_wait(&s.empty[ring.slot], ring.parity);
                barrier_expect(full, bytes * chunks);
#pragma unroll 1
                for (int c = 0; c < chunks; c++, from += apart)
                    copy_bulk(s.ring[ring.slot] + c * U::kNarrow * kTile, from, bytes, full, policy);
            }
        }
    }
    __device__ __forceinline__ void rows(const bf16* from, int count) {
#pragma unroll 1
        for (int i = 0; i < count; i += kKeys, ring.next()) {
            uint64_t* full = &s.full[ring.slot];
            const uint32_t bytes = min(kKeys, count - i) * kRow;
            barrier_wait(&s.empty[ring.slot], ring.parity);
            barrier_expect(full, bytes);
            copy_bulk(s.ring[ring.slot], from + static_cast<size_t>(i) * (kRow / 2), bytes, full);
        }
    }
    // Product number `i` of all steps, but for those that make the residual.
    __device__ __forceinline__ const bf16* matrix(int i) const { return a.layers[i / 4].weights[i % 4]; }
    __device__ __forceinline__ void run(int rank, int cluster, int clusters) {
        if (lane != 0) return;
        const Tiles narrow(kWidthTiles, U::kNarrow, cluster, clusters), qkv(kQkvTiles, U::kQkv, U::kFew ? blockIdx.x : cluster, U::kFew ? gridDim.x : clusters),
            wide(kMlpTiles, U::kWide, blockIdx.x, gridDim.x);
        const int count = 4 * a.layer_count, all = a.step_count * count;
        const bf16* next = all > 0 ? matrix(0) : nullptr;
#pragma unroll 1
        for (int step = 0; step < a.step_count; step++) {
            const Cut cut(a, a.rows(step), rank, cluster, clusters, U::kFew);
            // The products by turns: first, where there is one, what makes the residual; then QKV, O, gate/up and down of each layer.
#pragma unroll 1
            for (int i = a.time_w ? -1 : 0; i < count; i++) {
                const int product = i < 0 ? -1 : i % 4;
                const bf16* const w = i < 0 ? a.time_w : next;
                // On its way while this one's weights are fetched.
                if (i >= 0) next = matrix(min(step * count + i + 1, all - 1));
                // All of K, or a rank's quarter.
                const bool whole = product == 2 || (U::kFew && product == 0);
                const int chunks = product % 2 == 0 ? 1 : U::kChunks;
                const int pieces = (product == 1 ? 4 : whole || product == 3 ? 8 : 2) / chunks;
                weights(w, product == 0 ? kQkvTiles : product == 2 ? kMlpTiles : kWidthTiles, product == 0 ? qkv : product == 2 ? wide : narrow,
                        pieces, chunks, whole ? 0 : rank * pieces * chunks);
                if (product != 0) continue;
                const size_t at = i / 4 * a.params->layer_stride + static_cast<size_t>(cut.first_key) * (kRow / 2);
#pragma unroll 1
                for (int r = cut.first_row; r < cut.last_row; r += cut.group)
#pragma unroll 1
                    for (int v = 0; v < 2; v++) {
                        const int early = v ? cut.early * kKeys : 0;
                        rows((v ? a.params->values : a.params->keys) + at + early * (kRow / 2), cut.keys - early);
                    }
            }
        }
    }
};

// --- The warp that waits at the barriers and brings activations.

template <class U>
struct Loader {
    const PersistentArgs& a;
    Shared<U>& s;
    int lane;
    uint32_t groups = 0, finished = 0, wholes = 0, quarters = 0, layers = 0;  // wholes, quarters: blocks that have to have finished

    __device__ __forceinline__ Loader(const PersistentArgs& a, Shared<U>& s)
        : a(a), s(s), lane(threadIdx.x % 32) {}

    // Until `target` blocks have come to this lane's counter, for every lane. One that does not come means that blocks are not
    // all on the chip. The whole warp looks, which is quicker than one lane of it.
    __device__ __forceinline__ void wait(int counter, uint32_t target) {
        // Their places in shared memory are still in use until this block has finished, too.
        barrier_wait(&s.finished, finished);
        finished ^= 1;
        const uint32_t* const arrived = a.arrived + counter * kCounterWords;
        uint64_t start = 0, now;
        for (uint32_t looks = 1;; looks++) {
            uint32_t seen;
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
            if (__all_sync(0xffffffffu, static_cast<int32_t>(seen - target) >= 0)) break;
            if (looks % 4096 != 0) continue;
            asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
            if (start == 0) start = now;
            if (now - start < kPatience) continue;
            *reinterpret_cast<volatile uint32_t*>(a.error) = 1;
            __threadfence_system();
            __trap();
        }
        __syncwarp();
        // Of global memory alone: a fence of everything waits for the weights on their way as well.
        asm volatile("fence.proxy.async.global;" ::: "memory");
    }
    // `k` of K from number `first` such slice of a panel on, in `parts` that have a barrier each. The barriers of parts that
    // there are not turn as well, so that all four stay in step.
    __device__ __forceinline__ void slice(const bf16* panel, int k, int first, int parts) {
        if (lane != 0) return;
        const uint32_t all = k / 8 * kOctet, bytes = all / max(parts, 1);
        const uint8_t* from = reinterpret_cast<const uint8_t*>(panel) + static_cast<size_t>(first) * all;
#pragma unroll 1
        for (int c = 0; c < 4; c++) {
            barrier_expect(&s.acts_full[c], c < parts ? bytes : 0);
            if (c < parts) copy_bulk(s.acts + c * bytes, from + c * bytes, bytes, &s.acts_full[c]);
        }
    }
    __device__ __forceinline__ void attention(const Cut& c, int layer) {
        const Buffers b(s.acts, c);
        const size_t at = (static_cast<size_t>(layer) * a.suffix + c.first_suffix) * (kRow / 2);
#pragma unroll 1
        for (int r = c.first_row; r < c.last_row; r += c.group, groups++) {
            const uint32_t queries = min(c.group, c.last_row - r) * kRow, suffix = r == c.first_row ? c.suffix_keys * kRow : 0;
            if (groups) barrier_wait(&s.queries_free, (groups - 1) & 1);
            if (lane != 0) continue;
            barrier_expect(&s.queries_full, queries + 2 * suffix);
            copy_bulk(b.queries, a.q + static_cast<size_t>(r) * (kRow / 2), queries, &s.queries_full);
            if (suffix == 0) continue;
            copy_bulk(b.keys, a.suffix_keys + at, suffix, &s.queries_full);
            copy_bulk(b.values, a.suffix_values + at, suffix, &s.queries_full);
        }
    }
    // The first values of the prefix, as soon as nobody needs their place any more.
    __device__ __forceinline__ void early_values(const Cut& c, int layer) {
        if (lane != 0 || c.early == 0) return;
        const uint32_t bytes = c.early * kKeys * kRow;
        barrier_expect(&s.values_full, bytes);
        copy_bulk(Buffers(s.acts, c).early, a.params->values + layer * a.params->layer_stride + static_cast<size_t>(c.first_key) * (kRow / 2), bytes,
                  &s.values_full);
    }
    __device__ __forceinline__ void run(int rank, int cluster, int clusters) {
        const int phases = 5 * a.layer_count;
        // Of QKV's result, the blocks that make part number `lane`; of gate/up's, those that make this rank's quarter.
        const int part = min(lane, kHeads + 1);
        const uint32_t head_sharers = U::kFew ? sharers(part, kHead / 8, kQkvTiles, gridDim.x) : kRanks * sharers(part, kHead / 8, kQkvTiles, clusters);
        const uint32_t gated_sharers = sharers(rank, kMlpTiles / kRanks, kMlpTiles, gridDim.x);
#pragma unroll 1
        for (int step = 0; a.step_count > 0; step++) {
            const int tokens = a.rows(step);
            const Cut cut(a, tokens, rank, cluster, clusters, U::kFew);
            const uint32_t attended_sharers = kRanks * sharers(rank, kHeads / kRanks * tokens, kHeads * tokens, clusters);
            // The heads of this cluster's queries, and keys and values.
            const bool read = lane >= kHeads || (lane >= cut.first_row / tokens && lane <= (cut.last_row - 1) / tokens);
            // The flow, where there is one the product that makes the residual, and the layers'.
#pragma unroll 1
            for (int i = -2; i < phases; i++) {
                if (i == -1 && !a.time_w) continue;
                const int phase = i < 0 ? i : i % 5;
                if (phase == 1) {
                    layers++;
                    wait(kHeadParts + part, read ? layers * head_sharers : 0);
                } else if (phase == 2 || phase == 4) {
                    quarters += phase == 2 ? attended_sharers : gated_sharers;
                    wait(kQuarters + rank, quarters);
                } else if (step > 0 || i > -2) {
                    wholes += gridDim.x;
                    wait(kWholes, wholes);
                }
                if (phase == 1) {
                    attention(cut, i / 5);
                    continue;
                }
                const bf16* panel = phase < 0 ? a.u : phase == 2 ? a.attended : phase == 4 ? a.gated : a.hb[phase == 3];
                // As many parts as a product has pieces, at most four. The flow reads what it needs by itself.
                const bool whole = phase == 3 || (U::kFew && phase == 0);
                slice(panel, whole || phase == 4 ? kWidth : phase == 2 ? kAttention / kRanks : kWidth / kRanks, whole ? 0 : rank,
                      phase == -2 ? 0 : phase < 0 ? 1 : whole || phase == 4 ? 4 : 2);
                if (step == a.step_count) return;
                if (phase == 0) early_values(cut, i / 5);
            }
        }
    }
};

#endif
