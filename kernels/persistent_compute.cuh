// The eight warps of the persistent decoder that compute.
#pragma once
#include "persistent_flow.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// PIECES: of a rank's keys at most.
template <int PIECES, class U>
struct Compute {
    static constexpr int kStages = U::kStages, kNarrow = U::kNarrow, kQkv = U::kQkv, kWide = U::kWide, kInbox = U::kInbox;
    const PersistentArgs& a;
    Shared<U>& s;
    const int tid, lane, warp, wg, rank, cluster, clusters;  // tid: within the warpgroup; warp: likewise
    Ring<kStages> ring;
    uint32_t acts_parity = 0, inbox_parity = 0, groups = 0, phases = 0, early_parity = 0;
    int rows = 0;  // token rows of this step

    __device__ __forceinline__ Compute(const PersistentArgs& a, Shared<U>& s, int rank, int cluster, int clusters)
        : a(a), s(s), tid(threadIdx.x % 128), lane(threadIdx.x % 32), warp(of_warp(threadIdx.x % 128 / 32)), wg(of_warp(threadIdx.x / 128)),
          rank(rank), cluster(cluster), clusters(clusters) {}

    __device__ __forceinline__ void begin() {
        if (a.delay > 0) {
            uint32_t z = (blockIdx.x * 2654435761u) ^ (++phases * 0x9e3779b9u) ^ static_cast<uint32_t>(a.delay);
            z ^= z >> 16, z *= 0x7feb352du, z ^= z >> 15, z *= 0x846ca68bu, z ^= z >> 16;
            __nanosleep(__umulhi(z, a.delay));
        }
    }
    // This block has finished a phase, and made parts [first, last) of its result: what it wrote is there for whoever sees the
    // counts. The release also waits for the weights on their way; but stores that are merely seen to end (bulk stores, and a
    // relaxed count) are not yet seen by others.
    __device__ __forceinline__ void done(int first = kWholes, int last = kWholes + 1) {
        meet(1, kComputing);
        if (threadIdx.x == 0) barrier_arrive(&s.finished, 1);
        const int counter = first + threadIdx.x;
        if (counter < last && !(a.delay < 0 && blockIdx.x == 0))
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.arrived + counter * kCounterWords) : "memory");
    }
    // This block's pieces of a result that has parts of `each`.
    __device__ __forceinline__ void done(int counters, Span pieces, int each) {
        const Span parts = parts_of(pieces, each);
        done(counters + parts.first, counters + parts.last);
    }

    // Units of a phase are multiplied one after the other, by turns of the warpgroups: whoever is far from the head of the
    // ring could not tell one round of it from the next. The first two may go together where they fit the ring. The turn is
    // passed while the last piece is multiplied: it has landed, and so has what was in the next one's place.
    __device__ __forceinline__ static bool by_turns(int unit, int pieces) { return unit > 1 || (unit == 1 && 2 * pieces > kStages); }
    __device__ __forceinline__ void take_turn(int unit, int pieces) {
        if (by_turns(unit, pieces)) meet(4 + unit % 2, kComputing);
    }
    __device__ __forceinline__ void pass_turn(int unit, int units, int pieces) {
        if (unit + 1 < units && by_turns(unit + 1, pieces)) asm volatile("bar.arrive %0, %1;" ::"r"(4 + (unit + 1) % 2), "r"(kComputing) : "memory");
    }

    // acc = tokens · weights over pieces [first, last) of CHUNKS chunks, and as many columns as `acc` holds. Each EACH of them
    // have activations of their own. issued(): what can be done while the last piece is multiplied.
    template <int CHUNKS, int EACH, int REGS, class Issued>
    __device__ __forceinline__ void product(float (&acc)[REGS], int first, int last, Issued issued) {
        constexpr int kPiece = CHUNKS * kChunk;
        const uint64_t x = operand(of_warp(smem_address(s.acts)), kOctet, 128);
        uint32_t before = 0;
#pragma unroll
        for (int i = 0; i < REGS; i++) acc[i] = 0.0f;
#pragma unroll 1
        for (int p = first; p < last; p++) {
            barrier_wait(&s.full[ring.slot], ring.parity);
            const uint64_t w = operand(of_warp(smem_address(s.ring[ring.slot])), 128, kTile);
            const uint64_t here = x + p * (kPiece / 8 * kOctet >> 4);
            if (p % EACH == 0) barrier_wait(&s.acts_full[p / EACH], acts_parity);
            mma_begin();
#pragma unroll
            for (int k = 0; k < kPiece / 16; k++) mma(acc, here + (k * 2 * kOctet >> 4), w + (k / 8 * kNarrow * kTile + k % 8 * 256 >> 4));
            mma_commit();
            if (p > first) {
                mma_wait<1>();
                if (lane == 0) barrier_arrive(&s.empty[before], 2);
            }
            before = ring.slot;
            ring.next();
        }
        issued();
        mma_wait<0>();
        if (lane == 0) barrier_arrive(&s.empty[before], 2);
    }
    template <int CHUNKS, int EACH, int REGS>
    __device__ __forceinline__ void product(float (&acc)[REGS], int first, int last) {
        product<CHUNKS, EACH>(acc, first, last, [] {});
    }

    // The lanes of a pair exchange what they have of a tile: four neighbouring columns of the upper row for the even one, of
    // the lower for the odd one.
    __device__ __forceinline__ float4 of_one_row(const float* c) const {
        const bool odd = lane & 1;
        const float x = __shfl_xor_sync(0xffffffffu, odd ? c[0] : c[2], 1), y = __shfl_xor_sync(0xffffffffu, odd ? c[1] : c[3], 1);
        return odd ? make_float4(x, y, c[2], c[3]) : make_float4(c[0], c[1], x, y);
    }

    // Where this block finds what rank `from` has sent of a tile of the present unit.
    __device__ __forceinline__ float* inbox(int from, int tile) const {
        return s.inbox + ((U::kFew ? from : wg * kRanks + from) * kInbox + tile) * (kOwn * 8);
    }
    // Which barriers of it.
    __device__ __forceinline__ int box() const { return U::kFew ? 0 : wg; }

    // This rank's sums of `tiles` tiles to the ranks that finish them, by token row.
    template <int REGS>
    __device__ __forceinline__ void send_sums(const float (&acc)[REGS], int tiles) {
        const int g = lane / 4, t = lane % 4, odd = t & 1;
        const int row = warp * 16 + g + 8 * odd;  // even lanes take the upper row of a pair of lanes, odd ones the lower
        const int to_rank = min(row / kOwn, kRanks - 1);
        const uint32_t to = remote_address(inbox(rank, 0) + row % kOwn * 8 + t / 2 * 4, to_rank), barrier = remote_address(&s.received[box()], to_rank);
#pragma unroll
        for (int j = 0; j < REGS / 4; j++) {
            const float4 v = of_one_row(acc + 4 * j);
            if (j < tiles && row < kOwn * kRanks) send(to + j * (kOwn * 32), v, barrier);
        }
    }
    __device__ __forceinline__ float inverse_rms(float squares) const { return rsqrtf(squares * a.inv_width + kEps); }
    // The ranks' sums of four neighbouring columns.
    __device__ __forceinline__ float4 sums(int tile, int own, int column) const {
        float4 v = {};
#pragma unroll
        for (int c = 0; c < kRanks; c++) {
            const float4 p = load4(inbox(c, tile) + own * 8 + column);
            v.x += p.x, v.y += p.y, v.z += p.z, v.w += p.w;
        }
        return v;
    }

    // Sums of squares of a rank's token rows, four rows a lane: those of tiles first, first + step, ...
    template <int TILES>
    struct Squares {
        float4 parts[TILES];
        __device__ __forceinline__ void load(const float* squares, int rank, int first, int step, int quad) {
            const float4* from = reinterpret_cast<const float4*>(squares) + (rank * kWidthTiles + first) * 4 + quad;
#pragma unroll
            for (int i = 0; i < TILES; i++) parts[i] = __ldcg(from + i * step * 4);
        }
        // Over the warp: every fourth lane has other rows.
        __device__ __forceinline__ float4 sum() const {
            float v[4] = {};
#pragma unroll
            for (int i = 0; i < TILES; i++) v[0] += parts[i].x, v[1] += parts[i].y, v[2] += parts[i].z, v[3] += parts[i].w;
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int m = 4; m < 32; m <<= 1) v[r] += __shfl_xor_sync(0xffffffffu, v[r], m);
            return make_float4(v[0], v[1], v[2], v[3]);
        }
    };

    // Of four rows of rank `warp` a lane, of the first four lanes.
    __device__ __forceinline__ void keep_inverse_rms(float4 squares) {
        const float v[4] = {squares.x, squares.y, squares.z, squares.w};
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (lane < 4 && lane * 4 + r < kOwn) s.inverse_rms[warp * kOwn + lane * 4 + r] = inverse_rms(v[r]);
    }

    // A product split over the cluster. before(tiles): operands of the end that the phase before does not write; after(operands):
    // those that it does, on their way while the product runs; meanwhile(operands): what can be done while the ranks' sums are
    // on their way; finish(tiles, operands): adds them up, of 13 rows. Each EACH pieces have activations of their own.
    template <int MOST, int CHUNKS, int EACH, class Before, class After, class Meanwhile, class Finish>
    __device__ __forceinline__ void split(int count, int pieces, Before before, After after, Meanwhile meanwhile, Finish finish) {
        begin();
        const Tiles tiles(count, MOST, cluster, clusters);
#pragma unroll 1
        for (int u = 0; u < tiles.units; u++) {
            if (u % 2 != wg) {
                ring.skip(pieces);
                if (U::kFew) inbox_parity ^= 1;
                continue;
            }
            const Span span = tiles.of(u);
            if (!U::kFew && tid == 0) barrier_expect(&s.received[wg], kRanks * kOwn * 32 * (span.last - span.first));
            auto operands = before(span);
            // The first activations are there: so is all that the phase before wrote.
            barrier_wait(&s.acts_full[0], acts_parity);
            after(operands);
            float acc[4 * MOST];
            take_turn(u, pieces);
            product<CHUNKS, EACH>(acc, 0, pieces, [&] { pass_turn(u, tiles.units, pieces); });
            // The ranks have taken what was in their inboxes before. Where both warpgroups have the same one, a unit is let to it when
            // the one before has seen the one before that taken: whoever waits is at most one round behind.
            if (U::kFew && u > 0) meet(7 + u % 2, kComputing);
            barrier_wait(&s.inbox_free[box()], inbox_parity ^ 1);
            if (U::kFew && u + 1 < tiles.units) asm volatile("bar.arrive %0, %1;" ::"r"(7 + (u + 1) % 2), "r"(kComputing) : "memory");
            if (U::kFew && tid == 0) barrier_expect(&s.received[0], kRanks * kOwn * 32 * (span.last - span.first));
            send_sums(acc, span.last - span.first);
            meanwhile(operands);
            barrier_wait(&s.received[box()], inbox_parity);
            finish(span, operands);
            meet(2 + wg, 128);
            if (tid < kRanks) barrier_arrive_remote(remote_address(&s.inbox_free[box()], tid));
            inbox_parity ^= 1;
        }
        acts_parity ^= 1;
    }

    // Eight lanes a row, four columns a lane: the operands and the end of up to six or ten tiles, four at a time.
    static constexpr int kRounds = (kInbox + 3) / 4;

    struct ResidualOperands {
        float4 old[kRounds], scale[kRounds], gate[kRounds];
    };
    // h (+)= sums, and what the next norm needs of it. `init`: h = sums + bias, `gate` being the bias. A thread finds its own
    // part of h as it left it, or as the flow did, phases ago.
    __device__ __forceinline__ void residual(const float* scale, const float* gate, int pieces, bool init, int to) {
        const int own = tid / 8, part = tid % 8, n = rank * kOwn + own, column = part % 2 * 4;
        const bool valid = own < kOwn && n < (init ? a.horizon : rows);
        split<kNarrow, U::kChunks, 2 / U::kChunks>(
            kWidthTiles, pieces,
            [&](Span tiles) {
                ResidualOperands r = {};
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int tile = tiles.first + 4 * i + part / 2, m = tile * 8 + column;
                    if (!valid || tile >= tiles.last) continue;
                    r.scale[i] = load4(scale + m);
                    r.gate[i] = gate ? load4(gate + m) : init ? make_float4(0, 0, 0, 0) : make_float4(1, 1, 1, 1);
                    if (!init) r.old[i] = load4(a.h + n * kWidth + m);
                }
                return r;
            },
            [](ResidualOperands&) {}, [](ResidualOperands&) {},
            [&](Span tiles, const ResidualOperands& r) {
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int j = 4 * i + part / 2, tile = tiles.first + j, m = tile * 8 + column;
                    float squares = 0.0f;
                    if (valid && tile < tiles.last) {
                        const float4 sum = sums(j, own, column), g = r.gate[i], o = r.old[i], k = r.scale[i];
                        const float4 v = init ? make_float4(sum.x + g.x, sum.y + g.y, sum.z + g.z, sum.w + g.w)
                                              : make_float4(sum.x * g.x + o.x, sum.y * g.y + o.y, sum.z * g.z + o.z, sum.w * g.w + o.w);
                        *reinterpret_cast<float4*>(a.h + n * kWidth + m) = v;
                        *reinterpret_cast<uint2*>(a.hb[to] + panel(n, m, kPanelRows)) = pack_bf16x4(make_float4(v.x * k.x, v.y * k.y, v.z * k.z, v.w * k.w));
                        squares = (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
                    }
                    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
                    if (valid && tile < tiles.last && part % 2 == 0) a.squares[to][squares_at(n, tile)] = squares;
                }
            });
    }

    struct QkvOperands {
        float4 bias[kRounds], turn[kRounds];
        Squares<4> squares;
    };
    // Where clusters are many, split over a cluster. Columns 2p and 2p+1 are pair p of the rotation.
    __device__ __forceinline__ void qkv_split(const LayerArgs& w, int layer) {
        const int own = tid / 8, part = tid % 8, n = rank * kOwn + own;
        const bool valid = own < kOwn && n < rows;
        const float* const bias = w.qkv_bias;
        const int key = n == a.horizon ? 0 : a.has_state + n;
        split<kQkv, 1, 1>(
            kQkvTiles, 2,
            [&](Span tiles) {
                QkvOperands r;
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int tile = tiles.first + 4 * i + part / 2, pair = tile * 4 + part % 2 * 2;
                    const bool mine = valid && tile < tiles.last;
                    r.turn[i] = r.bias[i] = make_float4(0, 0, 0, 0);
                    if (mine && pair / (kHead / 2) <= kHeads)
                        r.turn[i] = load4(reinterpret_cast<const float*>(a.rope + (a.params->prefix + key) * (kHead / 2) + pair % (kHead / 2)));
                    if (mine && bias) r.bias[i] = load4(bias + 2 * pair);
                }
                return r;
            },
            [&](QkvOperands& r) { r.squares.load(a.squares[0], rank, tid / 4, 32, tid % 4); },
            [&](QkvOperands& r) {
                const float4 v = r.squares.sum();
                if (lane < 4) *reinterpret_cast<float4*>(&s.row_squares[wg][warp][lane * 4]) = v;
                meet(2 + wg, 128);
            },
            [&](Span tiles, const QkvOperands& r) {
                const float(&q)[4][16] = s.row_squares[wg];
                const float rinv = inverse_rms((q[0][own] + q[1][own]) + (q[2][own] + q[3][own]));
#pragma unroll
                for (int i = 0; i < kRounds; i++) {
                    const int j = 4 * i + part / 2, tile = tiles.first + j, pair = tile * 4 + part % 2 * 2;
                    if (!valid || tile >= tiles.last) continue;
                    float4 v = sums(j, own, part % 2 * 4);
                    const float4 b = r.bias[i], c = r.turn[i];
                    v = make_float4(v.x * rinv + b.x, v.y * rinv + b.y, v.z * rinv + b.z, v.w * rinv + b.w);
                    const int head = pair / (kHead / 2), d = pair % (kHead / 2);
                    if (head <= kHeads) v = make_float4(v.x * c.x - v.y * c.y, v.y * c.x + v.x * c.y, v.z * c.z - v.w * c.w, v.w * c.z + v.z * c.w);
                    const size_t at = (static_cast<size_t>(layer) * a.suffix + key) * (kRow / 2);
                    bf16* to = (head < kHeads ? a.q + (head * rows + n) * (kRow / 2) : (head == kHeads ? a.suffix_keys : a.suffix_values) + at) + d;
                    *reinterpret_cast<uint32_t*>(to) = pack_bf16(v.x, v.z);
                    *reinterpret_cast<uint32_t*>(to + kHead / 2) = pack_bf16(v.y, v.w);
                }
            });
    }

    // Where clusters are few, all of K is in this block, and no ranks exchange sums: the second warpgroup measures rows and
    // multiplies the last quarter. Everything is added in the order of qkv_split().
    __device__ __forceinline__ void qkv_whole(const LayerArgs& w, int layer) {
        constexpr int kQuarter = kWidth / kChunk / 4, kLast = 3 * kQuarter;
        begin();
        const Tiles tiles(kQkvTiles, kQkv, blockIdx.x, gridDim.x);
        float4* const last = reinterpret_cast<float4*>(s.inbox) + tid;  // [tiles][kRowThreads]
        const int n = warp * 16 + lane / 4 + lane % 2 * 8, key = n == a.horizon ? 0 : min(a.has_state + n, a.suffix - 1);
        const int first = lane % 4 / 2 * 2;  // of the pairs in a tile
#pragma unroll 1
        for (int u = 0; u < tiles.units; u++) {
            float acc[4 * kQkv];
            if (wg == 1) {
                if (u == 0) {
                    // The first activations are there: so are the sums of squares.
                    barrier_wait(&s.acts_full[0], acts_parity);
                    Squares<kWidthTiles / 32> quarters[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) quarters[i].load(a.squares[0], warp, i * 8 + lane / 4, 32, lane % 4);
                    float4 q[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) q[i] = quarters[i].sum();
                    keep_inverse_rms(make_float4((q[0].x + q[1].x) + (q[2].x + q[3].x), (q[0].y + q[1].y) + (q[2].y + q[3].y),
                                                 (q[0].z + q[1].z) + (q[2].z + q[3].z), (q[0].w + q[1].w) + (q[2].w + q[3].w)));
                }
                ring.skip(kLast);
                // Not a round of the ring ahead of the other warpgroup.
                meet(4, kComputing);
                product<1, kQuarter>(acc, kLast, kLast + kQuarter);
                if (u > 0) meet(5, kComputing);
#pragma unroll
                for (int j = 0; j < kQkv; j++)
                    if (tid < kRowThreads) last[j * kRowThreads] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
                asm volatile("bar.arrive 6, %0;" ::"n"(kComputing) : "memory");
                continue;
            }
            const Span span = tiles.of(u);
            const float* const turns = reinterpret_cast<const float*>(a.rope + (a.params->prefix + key) * (kHead / 2) + first);
            float4 turn[kQkv], bias[kQkv];
#pragma unroll
            for (int j = 0; j < kQkv; j++) {
                const uint32_t tile = min(span.first + j, kQkvTiles - 1);
                turn[j] = load4(turns + tile % (kHead / 8) * 8);
                bias[j] = w.qkv_bias ? load4(w.qkv_bias + tile * 8 + 2 * first) : make_float4(0, 0, 0, 0);
            }
            float sum[4 * kQkv] = {};
#pragma unroll 1
            for (int p = 0; p < kLast; p += kQuarter) {
                product<1, kQuarter>(acc, p, p + kQuarter);
                if (p == kQuarter) asm volatile("bar.arrive 4, %0;" ::"n"(kComputing) : "memory");
#pragma unroll
                for (int i = 0; i < 4 * kQkv; i++) sum[i] += acc[i];
            }
            ring.skip(kQuarter);
            meet(6, kComputing);
            const float rinv = s.inverse_rms[n];
#pragma unroll
            for (int j = 0; j < kQkv; j++) {
                const float4 q = tid < kRowThreads ? last[j * kRowThreads] : float4{};
                sum[4 * j] += q.x, sum[4 * j + 1] += q.y, sum[4 * j + 2] += q.z, sum[4 * j + 3] += q.w;
            }
            if (u + 1 < tiles.units) asm volatile("bar.arrive 5, %0;" ::"n"(kComputing) : "memory");
            uint2 results[kQkv];
#pragma unroll
            for (int j = 0; j < kQkv; j++) {
                float4 v = of_one_row(sum + 4 * j);
                const float4 b = bias[j], t = turn[j];
                v = make_float4(v.x * rinv + b.x, v.y * rinv + b.y, v.z * rinv + b.z, v.w * rinv + b.w);
                if (span.first + j < kTurnedTiles) v = make_float4(v.x * t.x - v.y * t.y, v.y * t.x + v.x * t.y, v.z * t.z - v.w * t.w, v.w * t.z + v.z * t.w);
                results[j] = make_uint2(pack_bf16(v.x, v.z), pack_bf16(v.y, v.w));
            }
            if (n < rows) {
                const size_t at = (static_cast<size_t>(layer) * a.suffix + key) * (kRow / 2) + first;
#pragma unroll
                for (int j = 0; j < kQkv; j++) {
                    const int tile = span.first + j, head = tile / (kHead / 8);
                    if (tile >= span.last) break;
                    bf16* to = (head < kHeads ? a.q + (head * rows + n) * (kRow / 2) + first : (head == kHeads ? a.suffix_keys : a.suffix_values) + at) + tile % (kHead / 8) * 4;
                    *reinterpret_cast<uint32_t*>(to) = results[j].x;
                    *reinterpret_cast<uint32_t*>(to + kHead / 2) = results[j].y;
                }
            }
            __syncwarp();
        }
        acts_parity ^= 1;
    }

    // gelu(gate)·up, all of K in this block; a tile's columns are a gate and its up by turns.
    __device__ __forceinline__ void gate_up(const LayerArgs& w) {
        begin();
        const int g = lane / 4, t = lane % 4, odd = t & 1;
        const Tiles tiles(kMlpTiles, kWide, blockIdx.x, gridDim.x);
        const float* const biases = w.gate_up_bias;
        if (wg == 1) {
            // While the other warpgroup multiplies. The first activations are there: so are the sums of squares.
            barrier_wait(&s.acts_full[0], acts_parity);
            Squares<16> squares;
            squares.load(a.squares[1], warp, lane / 4, 8, lane % 4);
            keep_inverse_rms(squares.sum());
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
                if (biases && span.first + j < span.last) bias[j] = *reinterpret_cast<const float2*>(biases + (span.first + j) * 8 + 2 * t);
            }
            float acc[4 * kWide];
            take_turn(u, kWidth / kChunk);
            product<1, 2>(acc, 0, kWidth / kChunk, [&] { pass_turn(u, tiles.units, kWidth / kChunk); });
            if (u == 0) meet(6, kComputing);
            const float rinv[2] = {s.inverse_rms[warp * 16 + g], s.inverse_rms[warp * 16 + g + 8]};
            // The four lanes of a row pair exchange what they have of two tiles: each writes four neighbours of one row and tile.
            const int n = warp * 16 + g + 8 * odd;
            auto gated = [&](int j) {
                const float upper = gelu_tanh(acc[4 * j] * rinv[0] + bias[j].x) * (acc[4 * j + 1] * rinv[0] + bias[j].y);
                const float lower = gelu_tanh(acc[4 * j + 2] * rinv[1] + bias[j].x) * (acc[4 * j + 3] * rinv[1] + bias[j].y);
                const uint32_t mine = pack_bf16(upper, lower), other = __shfl_xor_sync(0xffffffffu, mine, 1);
                return odd ? __byte_perm(other, mine, 0x7632) : __byte_perm(mine, other, 0x5410);
            };
#pragma unroll
            for (int j = 0; j < kWide; j += 2) {
                const uint32_t here = gated(j), next = j + 1 < kWide ? gated((j + 1) % kWide) : 0;
                const uint32_t other = __shfl_xor_sync(0xffffffffu, t < 2 ? next : here, 2);
                const int k = j + t / 2, tile = span.first + k;
                if (n < rows && k < kWide && tile < span.last)
                    *reinterpret_cast<uint2*>(a.gated + panel(n, tile * 4, kPanelRows)) = t < 2 ? make_uint2(here, other) : make_uint2(other, next);
            }
        }
        acts_parity ^= 1;
    }

    // Adds the scores of 16·M query rows against N times 8 keys.
    template <int M, int N, int TILES, int EACH>
    __device__ __forceinline__ void scores(float (&d)[TILES][EACH][4], const uint8_t* queries, const uint8_t* const (&keys)[EACH]) {
        const uint32_t key = (lane % 8) * kRow + (lane / 8) * 16;
        queries += (lane % 16) * kRow + (lane / 16) * 16;
#pragma unroll(M == 1 ? 2 : 1)
        for (int k = 0; k < kHead * 2; k += 64) {
            uint32_t k8[N][4];
#pragma unroll
            for (int i = 0; i < N; i++) ldmatrix_x4(k8[i], keys[i] + key + k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                uint32_t q[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++) ldmatrix_x4(q[h], queries + m * 16 * kRow + k + h * 32);
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int i = 0; i < N; i++) mma_16816(d[m][i], q[h][0], q[h][1], q[h][2], q[h][3], k8[i][2 * h], k8[i][2 * h + 1]);
            }
        }
    }
    template <int N, int TILES, int EACH>
    __device__ __forceinline__ void scores(int tiles, float (&d)[TILES][EACH][4], const uint8_t* queries, const uint8_t* const (&keys)[EACH]) {
        if (tiles == 1) {
            scores<1, N>(d, queries, keys);
        } else if constexpr (TILES > 1) {
            if (tiles == 2) scores<2, N>(d, queries, keys);
            else scores<TILES, N>(d, queries, keys);
        }
    }

    // Weights of `rows` query rows from row0 on over this rank's keys: scores, and softmax in the registers that hold them. A
    // warpgroup has every other piece of keys, EACH of them at a time, a warp 8 keys of each; behind the prefix comes the suffix,
    // of which the state row sees itself only. Where there is one batch there are at most as many pieces as the ring has.
    template <int TILES, int BATCHES, int EACH>
    __device__ __forceinline__ void weights(const Buffers& b, const Cut& c, int row0, int tiles) {
        constexpr int kPieces = EACH * BATCHES;
        static_assert(BATCHES == 1 || 2 * EACH < kStages, "a batch waits for no slot whose last piece nobody has waited for");
        const int w8 = wg * 4 + warp, g = lane / 4, t = lane % 4, suffix = c.pieces * kKeys;
        float d[BATCHES][TILES][EACH][4] = {};
        // Of the suffix, by row: all of it but for the state's row, which the first step has.
        const uint32_t seen = c.keys, own = c.suffix_keys, own_state = min(max(1 - c.first_suffix, 0), c.suffix_keys);
        uint32_t visible[TILES][2];
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                visible[m][r] = rows > a.horizon && static_cast<uint32_t>(row0 + m * 16 + g + 8 * r) % rows == a.horizon ? own_state : own;
#pragma unroll
        for (int batch = 0; batch < BATCHES; batch++) {
            if (2 * EACH * batch > c.pieces) break;
            // Neither warpgroup gets a round of the ring ahead of the other: it would take the round before for its own.
            if (batch > 0) meet(1, kComputing);
            const uint8_t* keys[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int p = wg + 2 * (EACH * batch + i);
                keys[i] = b.keys + (p == c.pieces ? warp % 2 * 8 * kRow : 0);
                if (p >= c.pieces) continue;
                const Ring<kStages> at = ring.ahead(p);
                keys[i] = s.ring[at.slot] + warp * 8 * kRow;
                barrier_wait(&s.full[at.slot], at.parity);
            }
            // The queries, and the suffix's keys and values.
            if (batch == 0) barrier_wait(&s.queries_full, groups & 1);
            const int left = c.pieces - wg - 2 * EACH * batch;
            if (EACH > 2 && left >= 4) scores<EACH>(tiles, d[batch], b.queries, keys);
            else if (left >= 2) scores<2>(tiles, d[batch], b.queries, keys);
            else scores<1>(tiles, d[batch], b.queries, keys);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int p = wg + 2 * (EACH * batch + i);
                if (p < c.pieces && lane == 0) barrier_arrive(&s.empty[ring.ahead(p).slot], 2);
            }
        }
        ring.skip(c.pieces);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            if (m >= tiles) break;
            float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = m * 16 + g + 8 * r;
#pragma unroll
                for (int i = 0; i < kPieces; i++) {
                    if (BATCHES > 1 && 2 * i > c.pieces) break;
#pragma unroll
                    for (int e = 2 * r; e < 2 * r + 2; e++) {
                        const int k = (wg + 2 * i) * kKeys + warp * 8 + 2 * t + (e & 1);
                        float& score = d[i / EACH][m][i % EACH][e];
                        score = static_cast<uint32_t>(k) < seen || static_cast<uint32_t>(k - suffix) < visible[m][r] ? score * a.scale : -INFINITY;
                        top[r] = fmaxf(top[r], score);
                    }
                }
                top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
                top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
                if (t == 0) b.tops[row * 8 + w8] = top[r];
            }
        }
        meet(1, kComputing);
        if (threadIdx.x == 0) barrier_arrive(&s.queries_free, 1);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            if (m >= tiles) break;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = m * 16 + g + 8 * r;
                const float top = over_warps_max(b.tops + row * 8), base = top == -INFINITY ? 0.0f : top;
                bf16* to = b.weights + row * (c.columns + 8) + wg * kKeys + warp * 8 + 2 * t;
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < kPieces; i++) {
                    if (BATCHES > 1 && 2 * i > c.pieces) break;
                    const uint32_t p = pack_bf16(exp2_fast(d[i / EACH][m][i % EACH][2 * r] - base), exp2_fast(d[i / EACH][m][i % EACH][2 * r + 1] - base));
                    const float2 back = unpack_bf16(p);
                    sum += back.x + back.y;
                    if ((wg + 2 * i) * kKeys + warp * 8 < c.columns) *reinterpret_cast<uint32_t*>(to + 2 * i * kKeys) = p;
                }
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (t == 0) b.sums[row * 8 + w8] = sum;
            }
        }
        meet(1, kComputing);
    }
    __device__ __forceinline__ static float over_warps_max(const float* tops) {
        const float4 x = load4(tops), y = load4(tops + 4);
        return fmaxf(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)), fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
    }

    // o += weights · values for 16·STEPS keys and this warp's 32 dimensions.
    template <int STEPS>
    __device__ __forceinline__ void weigh(float (&o)[3][4][4], const Buffers& b, const Cut& c, const uint8_t* values, int column, int tiles, int dims) {
        uint32_t v[STEPS][2][4];
#pragma unroll
        for (int k = 0; k < STEPS; k++)
#pragma unroll
            for (int h = 0; h < 2; h++) ldmatrix_x4_trans(v[k][h], values + (k * 16 + lane % 16) * kRow + (dims + h * 16 + (lane / 16) * 8) * 2);
        const bf16* row = b.weights + (lane % 16) * (c.columns + 8) + column + (lane / 16) * 8;
#pragma unroll
        for (int m = 0; m < 3; m++) {
            if (m >= tiles) break;
            uint32_t p[STEPS][4];
#pragma unroll
            for (int k = 0; k < STEPS; k++) ldmatrix_x4(p[k], row + m * 16 * (c.columns + 8) + k * 16);
#pragma unroll
            for (int k = 0; k < STEPS; k++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma_16816(o[m][j], p[k][0], p[k][1], p[k][2], p[k][3], v[k][j / 2][j % 2 * 2], v[k][j / 2][j % 2 * 2 + 1]);
        }
    }

    __device__ __forceinline__ void attention() {
        begin();
        const Cut c(a, rows, rank, cluster, clusters, U::kFew);
        const Buffers b(s.acts, c);
        const int all = threadIdx.x, w8 = wg * 4 + warp, g = lane / 4, t = lane % 4, odd = t & 1;
        // The ranks may send: what lay in their inboxes' place is not needed any more.
        if (all < kRanks) barrier_arrive_remote(remote_address(&s.parts_free, all));
        // Values of keys that are not there have no weight, but must be numbers.
        for (int i = all; i < (16 - c.suffix_keys) * (kHead / 8); i += kComputing)
            store_zero_16(b.values + (c.suffix_keys + i / (kHead / 8)) * kRow + i % (kHead / 8) * 16);
#pragma unroll 1
        for (int row0 = c.first_row; row0 < c.last_row; row0 += c.group, groups++) {
            const uint32_t parity = groups & 1;
            const int here = min(c.group, c.last_row - row0), tiles = (here + 15) / 16;
            if (all == 0) barrier_expect(&s.parts_received, kRanks * here * (64 * 4 + 8));
            if constexpr (PIECES <= kStages) weights<3, 1, (PIECES + 1) / 2>(b, c, row0, tiles);
            else weights<1, (PIECES + 1) / 4, 2>(b, c, row0, tiles);
            float o[3][4][4] = {};
#pragma unroll 1
            for (int p = 0; p < c.pieces; p++) {
                const bool early = p < c.early;
                if (p == 0 && early) barrier_wait(&s.values_full, early_parity);
                if (!early) barrier_wait(&s.full[ring.slot], ring.parity);
                weigh<2>(o, b, c, early ? b.early + p * kKeys * kRow : s.ring[ring.slot], p * kKeys, tiles, w8 * 32);
                if (early) continue;
                __syncwarp();
                if (lane == 0) barrier_arrive(&s.empty[ring.slot], 1);
                ring.next();
            }
            weigh<1>(o, b, c, b.values, c.pieces * kKeys, tiles, w8 * 32);
            // The ranks have got here, or joined the group before. Each joins 64 dimensions of all rows: those of two warps.
            barrier_wait(&s.parts_free, parity);
            const uint32_t parts = remote_address(&s.parts_received, w8 / 2);
#pragma unroll
            for (int m = 0; m < 3; m++) {
                if (m >= tiles) break;
                const int row = m * 16 + g + 8 * odd;
                const uint32_t to = remote_address(b.inbox + ((rank * 8 + w8 % 2 * 4) * c.group + row) * 8 + (t / 2) * 4, w8 / 2);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float4 v = of_one_row(o[m][j]);
                    if (row < here) send(to + j * c.group * 32, v, parts);
                }
            }
            if (all < here * kRanks) {
                const int r = all / kRanks;
                const float4 x = load4(b.sums + r * 8), y = load4(b.sums + r * 8 + 4);
                send(remote_address(b.inbox_stats + rank * c.group + r, all % kRanks),
                     make_float2(over_warps_max(b.tops + r * 8), ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w))),
                     remote_address(&s.parts_received, all % kRanks));
            }
            barrier_wait(&s.parts_received, parity);
            // Neighbouring threads write rows of neighbouring tokens, which lie together.
#pragma unroll 1
            for (int m = 0; m < tiles; m++) {
                const int r = m * 16 + all / 2 % 16, d8 = all / 32, half = all % 2, row = row0 + r;
                if (r >= here) continue;
                float top = -INFINITY;
#pragma unroll
                for (int k = 0; k < kRanks; k++) top = fmaxf(top, b.inbox_stats[k * c.group + r].x);
                float4 v = {};
                float sum = 0.0f;
#pragma unroll
                for (int k = 0; k < kRanks; k++) {
                    const float2 part = b.inbox_stats[k * c.group + r];
                    const float4 p = load4(b.inbox + ((k * 8 + d8) * c.group + r) * 8 + half * 4);
                    const float f = part.x == -INFINITY ? 0.0f : exp2_fast(part.x - top);
                    sum += f * part.y;
                    if (f != 0.0f) v.x += f * p.x, v.y += f * p.y, v.z += f * p.z, v.w += f * p.w;
                }
                const float inv = 1.0f / sum;
                *reinterpret_cast<uint2*>(a.attended + panel(row % rows, row / rows * kHead + rank * 64 + d8 * 8 + half * 4, kPanelRows)) =
                    pack_bf16x4(make_float4(v.x * inv, v.y * inv, v.z * inv, v.w * inv));
            }
            meet(1, kComputing);
            if (all < kRanks && row0 + c.group < c.last_row) barrier_arrive_remote(remote_address(&s.parts_free, all));
        }
        early_parity ^= c.early > 0;
        // Copies of the next phase overwrite what was written here.
        fence_async_shared();
    }

    // Each half of a layer ends with a product added to the residual: the attention's, and the MLP's. Before the first comes,
    // where there is one, the product that makes the residual.
    __device__ __forceinline__ void run() {
        const int halves = 2 * a.layer_count;
#pragma unroll 1
        for (int step = 0; a.step_count > 0; step++) {
            rows = a.rows(step);
            begin();
            Flow(a, s, rank, cluster, clusters, step).run(acts_parity);
            acts_parity ^= 1;
            if (step == a.step_count) break;
            done();
#pragma unroll 1
            for (int i = a.time_w ? -1 : 0; i < halves; i++) {
                const bool init = i < 0, mlp = i & 1;
                const LayerArgs& w = a.layers[step * a.layer_count + max(i, 0) / 2];
                if (!init && !mlp) {
                    if constexpr (U::kFew) qkv_whole(w, i / 2);
                    else qkv_split(w, i / 2);
                    const Span tiles(kQkvTiles, U::kFew ? blockIdx.x : cluster, U::kFew ? gridDim.x : clusters), queries(kHeads * rows, cluster, clusters);
                    done(kHeadParts, tiles, kHead / 8);
                    attention();
                    done(kQuarters, queries, kHeads / kRanks * rows);
                } else if (!init) {
                    gate_up(w);
                    const Span tiles(kMlpTiles, blockIdx.x, gridDim.x);
                    done(kQuarters, tiles, kMlpTiles / kRanks);
                }
                residual(init ? a.steps[step].scale : mlp ? w.end_scale : w.mid_scale, init ? a.time_bias : mlp ? w.end_gate : w.mid_gate,
                         (init ? 2 : mlp ? 8 : 4) / U::kChunks, init, !init && !mlp);
                done();
            }
        }
    }
};

#endif
