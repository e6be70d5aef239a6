// The persistent decoder by itself, without the engine: times, bits over numbers of blocks and random delays, and where the
// clocks go. For work on kernels/persistent*; needs nvcc with its runtime and a Hopper GPU.
//
//   nvcc -arch=sm_90a -std=c++17 -O3 -o decode_harness tools/decode_harness/main.cu
//   ./decode_harness [--runs N] [CLUSTERS...]       N decodes (200) of each number of clusters, compared step by step
//
// With clocks: python3 tools/decode_harness/clocks.py DIR, then nvcc as above with -DCLOCKS -DKERNEL='"DIR/persistent.cu"'.
// -DPREFIX=788: three views instead of two. -DACTIONS=100: values of an action instead of 32.
// Results do not depend on how work is cut: compare what `bits` says.
#ifndef KERNEL
#define KERNEL "../../kernels/persistent.cu"
#endif
#include KERNEL
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifndef PREFIX
#define PREFIX 532
#endif
#ifndef ACTIONS
#define ACTIONS 32
#endif
#define CHECK(call)                                                                       \
    do {                                                                                  \
        const cudaError_t e_ = (call);                                                    \
        if (e_ != cudaSuccess) printf("%s: %s\n", #call, cudaGetErrorString(e_)), exit(1); \
    } while (0)

constexpr int kLayers = 18, kSteps = 10, kHorizon = 50, kSuffix = kHorizon + 1, kCapacity = PREFIX + 300;
// The kernel for so many clusters, by tiles of a unit: see Units.
constexpr int kPieces = (PREFIX + kRanks * kKeys - 1) / (kRanks * kKeys);
constexpr auto kKernels = kPieces <= 3 ? std::array{persistent_decode_3_9, persistent_decode_5_10, persistent_decode_5_11}
                          : kPieces <= 5 ? std::array{persistent_decode_5_9, persistent_decode_5_10, persistent_decode_5_11}
                                         : std::array{persistent_decode_23_9, persistent_decode_23_10, persistent_decode_23_11};
constexpr auto kKernel = [](int clusters) { return kKernels[clusters == 12 ? 2 : kWidthTiles > 5 * clusters ? 1 : 0]; };
constexpr int kActions = ACTIONS, kJoints = ACTIONS / 2 - 2, kChunkFloats = kHorizon * kActions;

__device__ float uniform(size_t i, uint32_t seed) {
    uint32_t z = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    z ^= z >> 16, z *= 0x7feb352du, z ^= z >> 15, z *= 0x846ca68bu, z ^= z >> 16;
    return (z & 0xffffff) / 16777216.0f - 0.5f;
}
__global__ void fill(bf16* p, size_t n, float deviation, uint32_t seed) {
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x)
        p[i] = __float2bfloat16(uniform(i, seed) * 3.46f * deviation);
}
// A matrix packed as the kernel wants it, whose values do not depend on the packing.
__global__ void fill_packed(bf16* p, int rows, int columns, float deviation, uint32_t seed) {
    const int n = rows * columns, chunk = rows * kChunk;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const int in = i % chunk % (8 * kChunk), row = i % chunk / (8 * kChunk) * 8 + in % 64 / 8, column = i / chunk * kChunk + in / 64 * 8 + in % 8;
        p[i] = __float2bfloat16(uniform(static_cast<size_t>(row) * columns + column, seed) * 3.46f * deviation);
    }
}
__global__ void fill(float* p, size_t n, float middle, float width, uint32_t seed) {
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x)
        p[i] = middle + uniform(i, seed) * width;
}
__device__ unsigned long long hashes[kSteps];
// Of each step's velocities, a block a step, whatever the order of the threads.
__global__ void hash(const float* velocities) {
    unsigned long long sum = 0;
    for (int i = threadIdx.x; i < kChunkFloats; i += blockDim.x) {
        unsigned long long z = (__float_as_uint(velocities[blockIdx.x * kChunkFloats + i]) ^ static_cast<unsigned long long>(i) << 32) * 0x9e3779b97f4a7c15ull;
        z ^= z >> 29, z *= 0xbf58476d1ce4e5b9ull;
        sum += z ^ z >> 32;
    }
    atomicAdd(&hashes[blockIdx.x], sum);
}

template <class T>
T* zeroed(size_t n) {
    T* p;
    CHECK(cudaMalloc(&p, n * sizeof(T) + 65536));
    CHECK(cudaMemset(p, 0, n * sizeof(T) + 65536));
    return p;
}
template <class T>
T* copied(const std::vector<T>& from) {
    T* p = zeroed<T>(from.size());
    CHECK(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
bf16* halves(size_t n, float deviation, uint32_t seed) {
    bf16* p = zeroed<bf16>(n);
    fill<<<1024, 256>>>(p, n, deviation, seed);
    return p;
}
bf16* packed(int rows, int columns, float deviation, uint32_t seed) {
    bf16* p = zeroed<bf16>(static_cast<size_t>(rows) * columns);
    fill_packed<<<1024, 256>>>(p, rows, columns, deviation, seed);
    return p;
}
float* floats(size_t n, float middle, float width, uint32_t seed) {
    float* p = zeroed<float>(n);
    fill<<<64, 256>>>(p, n, middle, width, seed);
    return p;
}

template <class T>
std::vector<T> read(const T* from, size_t n) {
    std::vector<T> v(n);
    CHECK(cudaMemcpy(v.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
struct Distance {
    double squares = 0, of_all = 0;
    void add(double found, double expected) { squares += (found - expected) * (found - expected), of_all += expected * expected; }
    double of() const { return std::sqrt(squares / of_all); }
};

struct Harness {
    PersistentArgs args{};
    StepArgs last;
    cudaStream_t stream;

    Harness() {
        std::vector<LayerArgs> layers(kSteps * kLayers);
        for (int l = 0; l < kSteps * kLayers; l++) {
            if (l >= kLayers) {
                layers[l] = layers[l - kLayers];
                continue;
            }
            const int rows[] = {kQkvTiles * 8, kWidth, 2 * kMlp, kWidth}, columns[] = {kWidth, kAttention, kWidth, kMlp};
            const float deviations[] = {0.03f, 0.02f, 0.03f, 0.015f};
            for (int p = 0; p < 4; p++) layers[l].weights[p] = packed(rows[p], columns[p], deviations[p], l * 7 + 1 + p);
            layers[l].mid_scale = floats(kWidth, 1, 0.2f, l), layers[l].end_scale = floats(kWidth, 1, 0.2f, l + 99);
        }
        std::vector<StepArgs> steps(kSteps);
        const float *scale = floats(kWidth, 1, 0.2f, 603), *out_scale = floats(kWidth, 1, 0.2f, 604), *out_bias = floats(kActions, 0, 0.1f, 605);
        for (int i = 0; i < kSteps; i++) steps[i] = {scale, floats(kWidth, 0, 0.5f, 700 + i), out_bias, out_scale, 1 - i / static_cast<float>(kSteps)};
        constexpr int kPadded = kRow / 2;
        const size_t cached = static_cast<size_t>(kLayers) * kCapacity * kPadded;
        const DecodeParams params{halves(cached, 1, 501), halves(cached, 1, 502), static_cast<int64_t>(kCapacity) * kPadded, PREFIX, 1};
        last = steps.back();
        args.layers = copied(layers), args.steps = copied(steps), args.params = copied(std::vector<DecodeParams>{params});
        args.x = zeroed<float>(kChunkFloats), args.velocities = zeroed<float>(kSteps * kChunkFloats);
        args.noise = floats(kChunkFloats, 0, 3.46f, 606), args.previous = floats(kChunkFloats, 0, 3.46f, 607);
        args.guidance = floats(kHorizon, 0.5f, 1, 608), args.gains = floats(kSteps, 1, 1, 609), args.state = floats(kJoints, 0, 2, 610);
        args.out_w = floats(kActions * kWidth, 0, 0.1f, 611), args.in_w = floats(kActions * kWidth, 0, 0.6f, 612);
        args.state_w = floats(kJoints * kWidth, 0, 0.6f, 613), args.state_b = floats(kWidth, 0, 0.5f, 614);
        args.rope = reinterpret_cast<float2*>(floats(2048 * kHead, 0.5f, 1, 77));
        args.time_w = packed(kWidth, kWidth, 0.03f, 601), args.time_bias = floats(kWidth, 0, 0.1f, 602);
        args.u = zeroed<bf16>(kPanelRows * kWidth);
        args.hb[0] = zeroed<bf16>(kPanelRows * kWidth), args.hb[1] = zeroed<bf16>(kPanelRows * kWidth), args.q = zeroed<bf16>(64 * kHeads * kPadded);
        args.suffix_keys = zeroed<bf16>(kLayers * kSuffix * kPadded), args.suffix_values = zeroed<bf16>(kLayers * kSuffix * kPadded);
        args.attended = zeroed<bf16>(kPanelRows * kAttention), args.gated = zeroed<bf16>(kPanelRows * kMlp);
        args.h = zeroed<float>(64 * kWidth), args.arrived = zeroed<uint32_t>(kCounters * kCounterWords);
        for (auto& squares : args.squares) squares = zeroed<float>(64 * kWidthTiles);
        CHECK(cudaHostAlloc(&args.error, sizeof(uint32_t), 0));
        *args.error = 0;
        args.scale = 1.44269504f / 16, args.inv_width = 1.0f / kWidth, args.dt = -1.0f / kSteps;
        args.step_count = kSteps, args.layer_count = kLayers, args.horizon = kHorizon, args.has_state = 1, args.suffix = kSuffix, args.action_dim = kActions, args.state_dim = kJoints;
        CHECK(cudaStreamCreate(&stream));
        for (const auto k : kKernels) CHECK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    }
    cudaLaunchConfig_t shape(int clusters, cudaLaunchAttribute* attributes) const {
        attributes[0].id = cudaLaunchAttributeClusterDimension, attributes[0].val.clusterDim = {kRanks, 1, 1};
        attributes[1].id = cudaLaunchAttributeCooperative, attributes[1].val.cooperative = 1;
        cudaLaunchConfig_t c{};
        c.gridDim = clusters * kRanks, c.blockDim = kThreads, c.dynamicSmemBytes = kShared, c.stream = stream;
        c.attrs = attributes, c.numAttrs = 2;
        return c;
    }
    int most_clusters() const {
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t c = shape(1, attributes);
        c.numAttrs = 1;
        int most;
        CHECK(cudaOccupancyMaxActiveClusters(&most, kKernel(1), &c));
        return most;
    }
    cudaGraphExec_t graph(int clusters, int delay, bool hashed) const {
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        CHECK(cudaMemsetAsync(args.arrived, 0, kCounters * kCounterWords * sizeof(uint32_t), stream));
        PersistentArgs a = args;
        a.delay = delay;
        cudaLaunchAttribute attributes[2];
        const cudaLaunchConfig_t c = shape(clusters, attributes);
        CHECK(cudaLaunchKernelEx(&c, kKernel(clusters), a));
        if (hashed) hash<<<kSteps, 256, 0, stream>>>(args.velocities);
        cudaGraph_t captured;
        CHECK(cudaStreamEndCapture(stream, &captured));
        cudaGraphExec_t ready;
        CHECK(cudaGraphInstantiate(&ready, captured, 0));
        return ready;
    }
    void run(cudaGraphExec_t g) const {
        CHECK(cudaGraphLaunch(g, stream));
        CHECK(cudaStreamSynchronize(stream));
    }
    // Whether the last decode's flow is near the same in double precision: x moved by its velocities, the last step's input of
    // the time product, and the last velocities from the last residual.
    bool sound() const {
        const auto x0 = read(args.noise, kChunkFloats), ends = read(args.x, kChunkFloats), v = read(args.velocities, kSteps * kChunkFloats),
                   previous = read(args.previous, kChunkFloats), weights = read(args.guidance, kHorizon), gains = read(args.gains, kSteps),
                   h = read(args.h, 64 * kWidth), out_w = read(args.out_w, kActions * kWidth), in_w = read(args.in_w, kActions * kWidth),
                   out_scale = read(last.out_scale, kWidth), out_bias = read(last.out_bias, kActions), in_bias = read(last.in_bias, kWidth);
        const auto u = read(args.u, kPanelRows * kWidth);
        std::vector<double> x(x0.begin(), x0.end());
        Distance moved, into, out;
        for (int step = 0; step < kSteps; step++) {
            for (int n = 0; n < kHorizon && step == kSteps - 1; n++)
                for (int j = 0; j < kWidth; j++) {
                    double t = in_bias[j];
                    for (int i = 0; i < kActions; i++) t += x[n * kActions + i] * in_w[i * kWidth + j];
                    into.add(__bfloat162float(u[(j / 8 * kPanelRows + n) * 8 + j % 8]), t / (1 + std::exp(-t)));
                }
            for (int i = 0; i < kChunkFloats; i++) {
                const double t = 1 - step / static_cast<double>(kSteps), velocity = v[step * kChunkFloats + i];
                x[i] -= (velocity - gains[step] * weights[i / kActions] * (previous[i] - (x[i] - t * velocity))) / kSteps;
            }
        }
        for (int i = 0; i < kChunkFloats; i++) {
            double dot = 0, squares = 0;
            for (int j = 0; j < kWidth; j++) {
                const double r = h[i / kActions * kWidth + j];
                squares += r * r, dot += r * out_scale[j] * out_w[i % kActions * kWidth + j];
            }
            out.add(v[(kSteps - 1) * kChunkFloats + i], dot / std::sqrt(squares / kWidth + 1e-6) + out_bias[i % kActions]);
            moved.add(ends[i], x[i]);
        }
        printf("flow: in %.1e, out %.1e, moved %.1e\n", into.of(), out.of(), moved.of());
        return into.of() < 4e-3 && out.of() < 1e-5 && moved.of() < 1e-5;
    }
};

#ifdef CLOCKS
// Clocks of one thread in one layer, or in the flow, by the blocks: what passes from each mark to the next, from `first` on.
static void tell_clocks(int blocks, int first, int end) {
    static uint32_t at[kMostBlocks][kMarks];
    CHECK(cudaMemcpyFromSymbol(at, clocks_of, sizeof at));
    const int shown = blocks / 2;
    std::vector<std::pair<int, int>> order;
    for (int m = first; m < end; m++)
        if (const int since = static_cast<int>(at[shown][m] - at[shown][first]); at[shown][m] != 0 && since >= 0) order.push_back({since, m});
    std::sort(order.begin(), order.end());
    int last = first;
    for (auto [since, m] : order) {
        std::vector<int> spans;
        for (int b = 0; b < blocks; b++) spans.push_back(static_cast<int>(at[b][m] - at[b][last]));
        std::sort(spans.begin(), spans.end());
        printf("%6d  %6d | %6d %6d %6d  %s\n", since, static_cast<int>(at[shown][m] - at[shown][last]), spans[0], spans[blocks / 2], spans[blocks - 1], kNames[m]);
        last = m;
    }
}
#endif

int main(int count, char** words) {
    int runs = 200;
    std::vector<int> clusters;
    for (int i = 1; i < count; i++) {
        if (std::string(words[i]) == "--runs" && i + 1 < count) runs = atoi(words[++i]);
        else clusters.push_back(atoi(words[i]));
    }
    const Harness harness;
    const int most = harness.most_clusters();
    printf("at most %d clusters, prefix of %d rows\n", most, PREFIX);
    if (clusters.empty()) clusters = {most};
    unsigned long long expected[kSteps] = {};
    bool failed = false;
    for (const int n : clusters) {
        cudaEvent_t start, end;
        CHECK(cudaEventCreate(&start));
        CHECK(cudaEventCreate(&end));
        const cudaGraphExec_t timed = harness.graph(n, 0, false);
        std::vector<float> times;
        for (int i = 0; i < 45; i++) {
            CHECK(cudaEventRecord(start, harness.stream));
            CHECK(cudaGraphLaunch(timed, harness.stream));
            CHECK(cudaEventRecord(end, harness.stream));
            CHECK(cudaStreamSynchronize(harness.stream));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, start, end));
            if (i >= 5) times.push_back(ms);
        }
        std::sort(times.begin(), times.end());
        printf("%3d blocks: %.3f ms (%.3f to %.3f)\n", n * kRanks, times[20], times[2], times[37]);
#ifdef CLOCKS
        tell_clocks(n * kRanks, 0, kFlowMarks), tell_clocks(n * kRanks, kFlowMarks, kMarks);
#endif
        for (const int delay : {0, 3000, 30000}) {
            const cudaGraphExec_t hashed = harness.graph(n, delay, true);
            int wrong = 0;
            for (int r = 0; r < runs; r++) {
                unsigned long long found[kSteps] = {};
                CHECK(cudaMemcpyToSymbol(hashes, found, sizeof found));
                harness.run(hashed);
                CHECK(cudaMemcpyFromSymbol(found, hashes, sizeof found));
                if (expected[0] == 0) {
                    memcpy(expected, found, sizeof found);
                    printf("bits of the last step: %016llx\n", expected[kSteps - 1]);
                }
                for (int step = 0; step < kSteps; step++) wrong += found[step] != expected[step];
            }
            printf("%3d blocks, up to %d ns of delay: %d of %d steps differ\n", n * kRanks, delay, wrong, runs * kSteps);
            failed |= wrong > 0;
        }
        failed |= !harness.sound();
    }
    return failed;
}
