// The eight warps of the persistent decoder that compute.
#pragma once
#include "persistent.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

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

#endif
