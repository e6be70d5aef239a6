// The portable kernels' own source on a CPU against sums in double precision. Prints a line "case: distance" each;
// tests/emulation.rs says how large distances may be.
#include "portable.cu"
#include "attention.cu"
namespace loading {
#include "load.cu"
}
namespace tall {
#include "tower.cu"
}
namespace pointwise {
#include "pointwise.cu"
}
namespace persistent {
#include "persistent.cuh"
}
#include <random>

static std::mt19937 generator(1);
static float draw() { return std::normal_distribution<float>()(generator); }
static float value(bf16 v) { return __bfloat162float(v); }
static int padded(int n, int to) { return (n + to - 1) / to * to; }

typedef std::vector<bf16> Half;
typedef std::vector<float> Floats;
constexpr bf16 kNan = {0x7fc0};

static Half halves(size_t n, float deviation) {
    Half v(n);
    for (bf16& e : v) e = __float2bfloat16(draw() * deviation);
    return v;
}
static Floats floats(size_t n) {
    Floats v(n);
    for (float& e : v) e = draw();
    return v;
}

// Relative L2 of everything put in.
struct Distance {
    double apart = 0, whole = 0;
    void put(double ours, double expected) { apart += (ours - expected) * (ours - expected), whole += expected * expected; }
    void tell(const std::string& what) const { printf("%s: %.3e\n", what.c_str(), std::sqrt(apart / whole)); }
};

static void pack(const bf16* from, int rows, int cols, int order, int first, int head_dim, Half& to) {
    const loading::PackArgs a{from, to.data(), rows, cols, padded(cols, 128), 0, 0, order, first, head_dim, loading::kFragments};
    launch({1, 1, 1}, 256, 0, [=] { loading::load_pack(a); });
}

// The three products of one size, as plan.rs and decoder.rs launch them.
template <int NT>
static void products(int width, int heads, int head_dim, int mlp, int horizon, int has_state) {
    const int rows = horizon + has_state, stride = 8 * NT + 2, wide = padded(width, 128), parts = wide / 16;
    const std::string size = " of width " + std::to_string(width) + ", " + std::to_string(rows) + " rows";
    auto shared = [](int rows, int warps) { return static_cast<size_t>(warps) * 8 * NT * (rows + 4) * 4; };
    auto panel_of = [&](int k) { return Half(static_cast<size_t>(padded(k, 128)) / 8 * stride * 8, bf16{0}); };
    auto dot = [&](const Half& x, int n, const bf16* w, int k) {
        double sum = 0;
        for (int i = 0; i < k; i++) sum += value(x[panel(n, i, stride)]) * value(w[i]);
        return sum;
    };
    Half x = panel_of(width);
    Floats squares(static_cast<size_t>(parts) * 64, NAN);
    std::vector<double> rinv(rows);
    for (int n = 0; n < rows; n++) {
        double sum = 0;
        for (int k = 0; k < width; k++) {
            const bf16 v = x[panel(n, k, stride)] = __float2bfloat16(draw());
            sum += value(v) * value(v);
        }
        rinv[n] = 1 / std::sqrt(sum / width + 1e-6);
        for (int i = 0; i < parts; i++) squares[i * 64 + n] = sum * (i + 1) * 2 / (parts * (parts + 1.0));
    }
    SkinnyArgs base{};
    base.x = x.data(), base.squares = squares.data(), base.square_tiles = parts;
    base.inv_width = 1.0f / width, base.rows = rows, base.k = wide;
    {
        const int outputs = (heads + 2) * head_dim, tiles = padded(outputs, 64) / 64, half = head_dim / 2, prefix = 7;
        const Half w = halves(static_cast<size_t>(outputs) * width, 0.05f);
        Half packed(static_cast<size_t>(tiles) * 64 * wide, bf16{0});
        for (auto [first, count] : {std::pair(0, heads), std::pair(heads, 1), std::pair(heads + 1, 1)})
            pack(&w[static_cast<size_t>(first) * head_dim * width], count * head_dim, width, 1, first, head_dim, packed);
        Half q(static_cast<size_t>(64) * heads * head_dim, kNan), keys(static_cast<size_t>(rows) * head_dim, kNan), values = keys;
        std::vector<float2> rope;
        for (int p = 0; p < prefix + rows; p++)
            for (int i = 0; i < half; i++) {
                const double angle = p / std::pow(10000.0, 2.0 * i / head_dim);
                rope.push_back({static_cast<float>(cos(angle)), static_cast<float>(sin(angle))});
            }
        const Floats bias = floats(static_cast<size_t>(tiles) * 64);
        const DecodeParams params{nullptr, nullptr, 0, prefix, 0};
        SkinnyArgs a = base;
        a.w = packed.data(), a.bias = bias.data(), a.rope = rope.data(), a.params = &params;
        a.q = q.data(), a.suffix_keys = keys.data(), a.suffix_values = values.data(), a.q_stride = heads * head_dim;
        a.heads = heads, a.head_dim = head_dim, a.horizon = horizon, a.has_state = has_state;
        launch({tiles * 2, 1, 1}, 256, shared(32, 8), [=] { product<NT, kQkv>(a); });
        Distance off;
        for (int n = 0; n < rows; n++)
            for (int h = 0; h < heads + 2; h++) {
                // The state row comes last and is the first of the suffix.
                const int key = n == horizon ? 0 : has_state + n;
                std::vector<double> y(head_dim);
                for (int d = 0; d < head_dim; d++) {
                    const int r = h * head_dim + d;
                    y[d] = dot(x, n, &w[static_cast<size_t>(r) * width], width) * rinv[n] + bias[loading::packed_row(r, 1, 0, head_dim, 32)];
                }
                for (int d = 0; d < head_dim; d++) {
                    const float2 c = rope[static_cast<size_t>(prefix + key) * half + d % half];
                    const double turned = d < half ? y[d] * c.x - y[d + half] * c.y : y[d] * c.x + y[d - half] * c.y;
                    const size_t at = static_cast<size_t>(key) * head_dim + d;
                    const bf16 got = h < heads ? q[(static_cast<size_t>(n) * heads + h) * head_dim + d] : h == heads ? keys[at] : values[at];
                    off.put(value(got), h <= heads ? turned : y[d]);
                }
            }
        off.tell("rounded, qkv" + size);
    }
    {
        const int tiles = padded(mlp, 32) / 32;
        const Half gate = halves(static_cast<size_t>(mlp) * width, 0.05f), up = halves(static_cast<size_t>(mlp) * width, 0.05f);
        Half packed(static_cast<size_t>(tiles) * 64 * wide, bf16{0}), y = panel_of(mlp);
        pack(gate.data(), mlp, width, 2, 0, 2, packed);
        pack(up.data(), mlp, width, 3, 0, 2, packed);
        SkinnyArgs a = base;
        a.w = packed.data(), a.y = y.data();
        launch({tiles * 2, 1, 1}, 256, shared(32, 8), [=] { product<NT, kGeglu>(a); });
        Distance off;
        for (int n = 0; n < rows; n++)
            for (int m = 0; m < mlp; m++) {
                const double g = dot(x, n, &gate[static_cast<size_t>(m) * width], width) * rinv[n];
                const double u = dot(x, n, &up[static_cast<size_t>(m) * width], width) * rinv[n];
                off.put(value(y[panel(n, m, stride)]), 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u);
            }
        off.tell("rounded, gate and up" + size);
    }
    for (int init = 0; init < 2; init++) {
        const int tiles = padded(width, 64) / 64;
        const Half w = halves(static_cast<size_t>(width) * mlp, 0.05f);
        Half packed(static_cast<size_t>(tiles) * 64 * padded(mlp, 128), bf16{0}), in = panel_of(mlp), next = panel_of(width);
        pack(w.data(), width, mlp, 0, 0, 2, packed);
        for (int n = 0; n < rows; n++)
            for (int k = 0; k < mlp; k++) in[panel(n, k, stride)] = __float2bfloat16(draw());
        Floats h = floats(static_cast<size_t>(64) * wide), sums(static_cast<size_t>(tiles) * 4 * 64, NAN);
        const Floats before = h, scale = floats(wide), gate = floats(wide), bias = floats(wide);
        SkinnyArgs a{};
        a.w = packed.data(), a.x = in.data(), a.rows = rows, a.k = padded(mlp, 128), a.h = h.data(), a.hb = next.data();
        a.scale = scale.data(), a.gate = init ? nullptr : gate.data(), a.bias = init ? bias.data() : nullptr;
        a.squares_out = sums.data(), a.h_stride = wide, a.init = init;
        launch({tiles * 4, 1, 1}, 512, shared(16, 16), [=] { product<NT, kResidual>(a); });
        Distance residual, scaled, squared;
        for (int n = 0; n < rows; n++) {
            double expected = 0, got = 0;
            for (int m = 0; m < tiles * 64; m++) {
                const double ours = h[static_cast<size_t>(n) * wide + m];
                expected += ours * ours;
                if (m >= width) continue;
                const double sum = dot(in, n, &w[static_cast<size_t>(m) * mlp], mlp);
                const double v = init ? sum + bias[m] : sum * gate[m] + before[static_cast<size_t>(n) * wide + m];
                residual.put(ours, v);
                scaled.put(value(next[panel(n, m, stride)]), v * scale[m]);
            }
            for (int i = 0; i < tiles * 4; i++) got += sums[i * 64 + n];
            squared.put(got, expected);
        }
        const std::string what = (init ? "first residual" : "residual") + size;
        residual.tell("exact, " + what);
        squared.tell("exact, squares of " + what);
        scaled.tell("rounded, scaled " + what);
    }
}

// Softmax in double precision over `keys` rows, given the address of each.
template <class Key, class Value>
static std::vector<double> softmax(const bf16* q, int head_dim, int keys, Key key, Value values) {
    std::vector<double> weights(keys), out(head_dim);
    double top = -INFINITY, sum = 0;
    for (int k = 0; k < keys; k++) {
        double score = 0;
        for (int d = 0; d < head_dim; d++) score += value(q[d]) * value(key(k)[d]);
        top = std::max(top, weights[k] = score / std::sqrt(head_dim));
    }
    for (double& w : weights) sum += w = std::exp(w - top);
    for (int k = 0; k < keys; k++)
        for (int d = 0; d < head_dim; d++) out[d] += weights[k] / sum * value(values(k)[d]);
    return out;
}

template <int HD>
static void decode(int heads, int head_dim, int horizon, int has_state, bool first_step, int prefix, int token_tiles) {
    const int suffix = horizon + has_state, tokens = horizon + (first_step ? has_state : 0), rows = tokens * heads;
    const int stride = 8 * token_tiles + 2, splits = 16, layer = 1, capacity = prefix + 3;
    const Half q = halves(static_cast<size_t>(rows) * head_dim, 1), suffix_keys = halves(static_cast<size_t>(suffix) * head_dim, 1);
    const Half suffix_values = halves(suffix_keys.size(), 1);
    // Two layers of a cache that is not full.
    Half keys(static_cast<size_t>(2) * capacity * head_dim, kNan), values = keys;
    for (size_t i = static_cast<size_t>(capacity) * head_dim, end = i + static_cast<size_t>(prefix) * head_dim; i < end; i++)
        keys[i] = __float2bfloat16(draw()), values[i] = __float2bfloat16(draw());
    const DecodeParams params{keys.data(), values.data(), static_cast<int64_t>(capacity) * head_dim, prefix, 0};
    Half out(static_cast<size_t>(padded(heads * head_dim, 128)) / 8 * stride * 8, bf16{0});
    Floats parts(static_cast<size_t>(splits) * rows * head_dim, NAN);
    std::vector<float2> tops(static_cast<size_t>(splits) * rows, float2{NAN, NAN});
    const float scale = 1.4426950408889634 / std::sqrt(head_dim);
    const PortableAttentionArgs a{q.data(), suffix_keys.data(), suffix_values.data(), out.data(), parts.data(), tops.data(), &params, scale,
                                  layer, heads, head_dim, rows, suffix, horizon, stride, splits};
    launch({splits, (rows + 63) / 64, 1}, 256, (64 + 4 * 32) * (HD + 8) * 2, [=] { attention_part<HD>(a); });
    launch({(rows * head_dim / 4 + 255) / 256, 1, 1}, 256, 0, [=] { portable_join(a); });
    Distance off, of_state;
    for (int r = 0; r < rows; r++) {
        const int n = r / heads;
        auto row = [&](const Half& cached, const Half& own, int k) {
            return k < prefix ? &cached[static_cast<size_t>(capacity + k) * head_dim] : &own[static_cast<size_t>(k - prefix) * head_dim];
        };
        const auto expected = softmax(&q[static_cast<size_t>(r) * head_dim], head_dim, n == horizon ? prefix + 1 : prefix + suffix,
                                      [&](int k) { return row(keys, suffix_keys, k); }, [&](int k) { return row(values, suffix_values, k); });
        for (int d = 0; d < head_dim; d++) {
            const double got = value(out[panel(n, r % heads * head_dim + d, stride)]);
            (n == horizon ? of_state : off).put(got, expected[d]);
        }
    }
    const std::string size = ", heads of " + std::to_string(head_dim) + ", " + std::to_string(prefix) + " cached keys";
    off.tell("rounded, decoder's attention" + size);
    if (first_step && has_state) of_state.tell("rounded, state row's attention" + size);
}

template <int HD, int KEYS>
static void encode(int heads, int head_dim, int rows, int batch) {
    const int width = heads * head_dim;
    const Half qkv = halves(static_cast<size_t>(batch) * rows * 3 * width, 1);
    Half out(static_cast<size_t>(batch) * rows * width, kNan);
    AttentionArgs a{};
    a.q = qkv.data(), a.k = a.q + width, a.v = a.q + 2 * width, a.out = out.data();
    a.q_batch = a.kv_batch = static_cast<int64_t>(rows) * 3 * width, a.out_batch = static_cast<int64_t>(rows) * width;
    a.q_row = a.kv_row = 3 * width, a.kv_head = head_dim, a.out_row = width;
    a.rows = a.keys = rows, a.head_dim = head_dim, a.scale = 1.4426950408889634 / std::sqrt(head_dim);
    launch({(rows + 63) / 64, heads, batch}, 256, (64 + 4 * KEYS) * (HD + 8) * 2, [=] { attention<HD, KEYS>(a); });
    Distance off;
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++)
            for (int r = 0; r < rows; r++) {
                auto at = [&](int row, int part) { return &qkv[((static_cast<size_t>(b) * rows + row) * 3 + part) * width + h * head_dim]; };
                const auto expected = softmax(at(r, 0), head_dim, rows, [&](int k) { return at(k, 1); }, [&](int k) { return at(k, 2); });
                for (int d = 0; d < head_dim; d++) off.put(value(out[(static_cast<size_t>(b) * rows + r) * width + h * head_dim + d]), expected[d]);
            }
    off.tell("rounded, encoder's attention, heads of " + std::to_string(head_dim) + ", " + std::to_string(rows) + " rows");
}

// Rows of 64 elements whose pieces of 8 are exchanged by row number, as geglu_wide.cu's matrix instructions read them.
static size_t swizzled(size_t tile, int height, int r, int k) { return (tile * height + r) * 64 + (k / 8 ^ r % 8) * 8 + k % 8; }

// The weights that geglu_wide.cu is given: 256 rows a tile.
static void wide(int width, int mlp) {
    const Half gate = halves(static_cast<size_t>(mlp) * width, 0.05f), up = halves(gate.size(), 0.05f);
    Half packed(2 * gate.size(), kNan);
    for (int part = 0; part < 2; part++) {
        const loading::PackArgs a{(part ? up : gate).data(), packed.data(), mlp, width, width, 2 * mlp, 0, 2 + part, 0, 2, loading::kWide};
        launch({1, 1, 1}, 256, 0, [=] { loading::load_pack(a); });
    }
    Distance weights;
    for (int j = 0; j < mlp; j++)
        for (int k = 0; k < width; k++) {
            const int in = j % 128, row = in / 64 * 128 + in % 4 / 2 * 64 + in % 64 / 16 * 16 + in % 16 / 4 * 2 + in % 2;
            const size_t tile = static_cast<size_t>(j / 128) * (width / 64) + k / 64;
            weights.put(value(packed[swizzled(tile, 256, row, k % 64)]), value(gate[static_cast<size_t>(j) * width + k]));
            weights.put(value(packed[swizzled(tile, 256, row + 8, k % 64)]), value(up[static_cast<size_t>(j) * width + k]));
        }
    weights.tell("exact, packed gate and up weights of " + std::to_string(mlp) + " units, width " + std::to_string(width));
}

// The norm behind the sum of a row and its parts.
template <int PARTS>
static void norm(int rows, int width, int threads) {
    const size_t count = static_cast<size_t>(rows) * width;
    const Floats before = floats(count), parts = floats(PARTS * count), scale = floats(width);
    Floats x = before;
    Half y(count, kNan);
    const pointwise::NormArgs a{x.data(), parts.data(), y.data(), scale.data(), nullptr, width, 1.0f / width, 1e-6f};
    launch({rows, 1, 1}, threads, 0, [=] { pointwise::norm<PARTS>(a); });
    Distance residual, normed;
    for (int n = 0; n < rows; n++) {
        std::vector<double> sums(width);
        double squares = 0;
        for (int k = 0; k < width; k++) {
            const size_t at = static_cast<size_t>(n) * width + k;
            sums[k] = before[at];
            for (int p = 0; p < PARTS; p++) sums[k] += parts[p * count + at];
            squares += sums[k] * sums[k];
            residual.put(x[at], sums[k]);
        }
        for (int k = 0; k < width; k++)
            normed.put(value(y[static_cast<size_t>(n) * width + k]), sums[k] / std::sqrt(squares / width + 1e-6) * scale[k]);
    }
    const std::string size = std::to_string(PARTS) + " parts, " + std::to_string(rows) + " rows of width " + std::to_string(width);
    normed.tell("rounded, norm, " + size);
    residual.tell(std::string("exact, ") + (PARTS ? "joined" : "untouched") + " rows, " + size);
}

// The same where tower.cu does the rest: rows times the weight, packed, and sums of squares that together are the row's.
template <int PARTS>
static void packed_norm(int rows, int width, int threads) {
    const size_t count = static_cast<size_t>(rows) * width;
    const int octets = (rows + 7) / 8, warps = threads / 32;
    const Floats before = floats(count), parts = floats(PARTS * count), scale = floats(width);
    Floats x = before;
    Half y(static_cast<size_t>(octets) * 8 * width, kNan);
    std::vector<float2> moments(static_cast<size_t>(warps) * rows, float2{NAN, NAN});
    const pointwise::NormArgs a{x.data(), parts.data(), y.data(), scale.data(), nullptr, width, 1.0f / width, 1e-6f, moments.data(), octets};
    launch({rows, 1, 1}, threads, 0, [=] { pointwise::norm<PARTS, true>(a); });
    Distance scaled, left;
    for (int n = 0; n < rows; n++) {
        double squares = 0, found = 0;
        for (int k = 0; k < width; k++) {
            const size_t at = static_cast<size_t>(n) * width + k;
            double sum = before[at];
            for (int p = 0; p < PARTS; p++) sum += parts[p * count + at];
            squares += sum * sum;
            scaled.put(value(y[swizzled(static_cast<size_t>(k / 64) * octets + n / 8, 8, n % 8, k % 64)]), sum * scale[k]);
        }
        for (int w = 0; w < warps; w++) found += moments[static_cast<size_t>(w) * rows + n].y;
        left.put(found, squares);
    }
    const std::string size = std::to_string(PARTS) + " parts, " + std::to_string(rows) + " rows of width " + std::to_string(width);
    scaled.tell("rounded, packed rows, " + size);
    left.tell("exact, sums left, " + size);
}

// What the tower's first norm is given: a row times the norm's weight, packed, and sums over 64 columns.
static void tower_begin(int tokens, int width) {
    const Floats x = floats(static_cast<size_t>(tokens) * width), scale = floats(width);
    Half y(x.size(), kNan);
    std::vector<float2> moments(static_cast<size_t>(width / 64) * tokens, float2{NAN, NAN});
    const tall::TowerBeginArgs a{x.data(), scale.data(), y.data(), moments.data(), tokens, width};
    launch({tokens, 1, 1}, 256, 0, [=] { tall::tower_begin(a); });
    Distance scaled, sums;
    for (int n = 0; n < tokens; n++)
        for (int tile = 0; tile < width / 64; tile++) {
            double sum = 0, squares = 0;
            for (int k = tile * 64; k < tile * 64 + 64; k++) {
                const double v = x[static_cast<size_t>(n) * width + k];
                sum += v, squares += v * v;
                scaled.put(value(y[swizzled(static_cast<size_t>(tile) * (tokens / 8) + n / 8, 8, n % 8, k % 64)]), v * scale[k]);
            }
            sums.put(moments[static_cast<size_t>(tile) * tokens + n].x, sum);
            sums.put(moments[static_cast<size_t>(tile) * tokens + n].y, squares);
        }
    const std::string size = std::to_string(tokens) + " rows of width " + std::to_string(width);
    scaled.tell("rounded, tower's rows, " + size);
    sums.tell("exact, tower's moments, " + size);
}

// A norm folded into the product behind it: w·scale and w·shift + bias of packed weights.
static void tower_fold(int outputs, int width) {
    const int tiles = (outputs + 63) / 64, k_blocks = width / 64;
    const Half w = halves(static_cast<size_t>(outputs) * width, 0.05f);
    Half packed(static_cast<size_t>(tiles) * k_blocks * 64 * 64, __float2bfloat16(0.0f));
    const loading::PackArgs pack{w.data(), packed.data(), outputs, width, width, 0, 0, 0, 0, 0, loading::kTower};
    launch({1, 1, 1}, 256, 0, [=] { loading::load_pack(pack); });
    const Floats scale = floats(width), shift = floats(width), bias = floats(outputs);
    Floats fold(tiles * 64, NAN), folded(tiles * 64, NAN);
    const tall::TowerFoldArgs a{packed.data(), scale.data(), shift.data(), bias.data(), fold.data(), folded.data(), outputs, tiles, k_blocks};
    launch({tiles * 8, 1, 1}, 256, 0, [=] { tall::tower_fold(a); });
    Distance off;
    for (int f = 0; f < tiles * 64; f++) {
        double on_scale = 0, on_shift = f < outputs ? bias[f] : 0;
        for (int k = 0; f < outputs && k < width; k++) {
            on_scale += static_cast<double>(value(w[static_cast<size_t>(f) * width + k])) * scale[k];
            on_shift += static_cast<double>(value(w[static_cast<size_t>(f) * width + k])) * shift[k];
        }
        off.put(fold[f], on_scale);
        off.put(folded[f], on_shift);
    }
    off.tell("exact, folded norm, " + std::to_string(outputs) + " of " + std::to_string(width));
}

// LayerNorm of rows that are far from zero and differ little, warps among each other too.
static void layer_norm(int rows, int width, int threads) {
    Floats x = floats(static_cast<size_t>(rows) * width);
    for (size_t i = 0; i < x.size(); i++) x[i] = 100 + 0.02f * x[i] + (i % width < 128 ? 0.05f : 0.0f);
    const Floats scale = floats(width), shift = floats(width);
    Half y(x.size(), kNan);
    const pointwise::NormArgs a{x.data(), nullptr, y.data(), scale.data(), shift.data(), width, 1.0f / width, 1e-6f};
    launch({rows, 1, 1}, threads, 0, [=] { pointwise::norm<0>(a); });
    Distance off;
    for (int n = 0; n < rows; n++) {
        const float* row = &x[static_cast<size_t>(n) * width];
        double mean = 0, squares = 0;
        for (int k = 0; k < width; k++) mean += static_cast<double>(row[k]) / width;
        for (int k = 0; k < width; k++) squares += (row[k] - mean) * (row[k] - mean);
        for (int k = 0; k < width; k++)
            off.put(value(y[static_cast<size_t>(n) * width + k]), (row[k] - mean) / std::sqrt(squares / width + 1e-6) * scale[k] + shift[k]);
    }
    off.tell("rounded, layer norm, " + std::to_string(rows) + " rows of width " + std::to_string(width));
}

// What tower.cu is given, read as its matrix instructions read it: tiles of 64 outputs, of which two neighbours are rows 8
// apart, and zeros to the end of the last tile and of K.
static void tower(int outputs, int width) {
    const int tiles = (outputs + 63) / 64, k_blocks = (width + 63) / 64;
    const Half w = halves(static_cast<size_t>(outputs) * width, 0.05f);
    Half packed(static_cast<size_t>(tiles) * k_blocks * 64 * 64, __float2bfloat16(0.0f));
    const loading::PackArgs a{w.data(), packed.data(), outputs, width, k_blocks * 64, 0, 0, 0, 0, 0, loading::kTower};
    launch({1, 1, 1}, 256, 0, [=] { loading::load_pack(a); });
    Distance off;
    for (int j = 0; j < tiles * 64; j++)
        for (int k = 0; k < k_blocks * 64; k++) {
            const int row = j % 64 / 16 * 16 + j % 16 / 2 + j % 2 * 8;
            const size_t at = ((static_cast<size_t>(j / 64) * k_blocks + k / 64) * 64 + row) * 64 + (k % 64 / 8 ^ row % 8) * 8 + k % 8;
            off.put(value(packed[at]), j < outputs && k < width ? value(w[static_cast<size_t>(j) * width + k]) : 0.0f);
        }
    off.tell("exact, weights packed for the tower, " + std::to_string(outputs) + " of " + std::to_string(width));
}

// The same of heads that it rotates: a tile is 32 pairs of a head, whose halves are rows 8 apart.
static void rotated(int heads, int head_dim, int width) {
    const int outputs = heads * head_dim, half = head_dim / 2, k_blocks = width / 64;
    const Half w = halves(static_cast<size_t>(outputs) * width, 0.05f);
    Half packed(w.size(), kNan);
    const loading::PackArgs a{w.data(), packed.data(), outputs, width, width, 0, 0, 1, 0, head_dim, loading::kTower};
    launch({1, 1, 1}, 256, 0, [=] { loading::load_pack(a); });
    Distance off;
    for (int h = 0; h < heads; h++)
        for (int pair = 0; pair < half; pair++)
            for (int second = 0; second < 2; second++)
                for (int k = 0; k < width; k++) {
                    const int row = pair % 32 / 8 * 16 + pair % 8 + 8 * second;
                    const size_t tile = static_cast<size_t>(h * head_dim / 64 + pair / 32) * k_blocks + k / 64;
                    off.put(value(packed[swizzled(tile, 64, row, k % 64)]), value(w[static_cast<size_t>(h * head_dim + second * half + pair) * width + k]));
                }
    off.tell("exact, rotated heads packed for the tower, " + std::to_string(heads) + " of " + std::to_string(head_dim));
}

// Of the persistent decoder: whoever waits for a part of a result waits for as many as say that they have made some of it.
static void counted(const char* what, int parts, int each, int least, int most) {
    Distance off;
    for (int many = least; many <= std::min(most, parts * each); many++) {
        std::vector<int> said(parts);
        for (int i = 0; i < many; i++) {
            const persistent::Span made = persistent::parts_of(persistent::Span(parts * each, i, many), each);
            for (int p = made.first; p < made.last; p++) said.at(p)++;
        }
        for (int p = 0; p < parts; p++) off.put(persistent::sharers(p, each, parts * each, many), said[p]);
    }
    off.tell(std::string("exact, counted ") + what + " of " + std::to_string(parts * each));
}

int main() {
    using namespace persistent;
    counted("heads", kHeads + 2, kHead / 8, 1, 160);
    counted("gated quarters", kRanks, kMlpTiles / kRanks, kRanks, 160);
    for (int tokens = 1; tokens <= kPanelRows; tokens++) counted("attended quarters", kRanks, kHeads / kRanks * tokens, 1, 40);
    tower(64, 64);
    tower(208, 200);
    rotated(2, 256, 128);
    rotated(1, 64, 64);
    tower_begin(16, 1152);
    tower_begin(8, 64);
    tower_fold(72, 192);
    wide(64, 128);
    wide(256, 384);
    norm<0>(21, 256, 64);
    norm<0>(2, 40, 32);
    norm<0>(3, 2048, 128);
    norm<1>(2, 64, 32);
    norm<2>(21, 256, 32);
    norm<2>(3, 2048, 128);
    norm<3>(9, 128, 32);
    norm<4>(2, 1088, 96);
    packed_norm<0>(21, 256, 64);
    packed_norm<2>(12, 2048, 128);
    packed_norm<2>(9, 1088, 96);
    layer_norm(3, 1152, 96);
    layer_norm(2, 200, 64);
    layer_norm(2, 4096, 256);
    encode<32, 64>(2, 8, 17, 2);
    encode<80, 64>(1, 72, 150, 1);
    encode<128, 64>(1, 96, 65, 1);
    encode<256, 32>(1, 256, 100, 1);
    decode<32>(2, 8, 5, 1, true, 9, 2);
    decode<32>(2, 16, 6, 0, true, 1, 2);
    decode<80>(3, 72, 10, 1, false, 100, 2);
    decode<128>(1, 104, 63, 1, true, 33, 8);
    decode<256>(2, 256, 50, 1, true, 532, 7);
    products<2>(16, 2, 8, 32, 5, 1);
    products<2>(32, 2, 16, 72, 10, 0);
    products<4>(136, 2, 24, 200, 30, 1);
    products<7>(256, 1, 64, 640, 50, 1);
    products<8>(128, 1, 32, 1024, 63, 1);
}
