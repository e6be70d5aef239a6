// The persistent decoder by itself, without the engine: times, bits over numbers of blocks and random delays, and where the
// clocks go. For work on kernels/persistent*; needs nvcc with its runtime and a Hopper GPU.
//
//   nvcc -arch=sm_90a -std=c++17 -O3 -o decode_harness tools/decode_harness/main.cu
//   ./decode_harness [--runs N] [CLUSTERS...]       N decodes (200) of each number of clusters, compared step by step
//
// With clocks: python3 tools/decode_harness/clocks.py DIR, then nvcc as above with -DCLOCKS -DKERNEL='"DIR/persistent.cu"'.
// -DPREFIX=788: three views instead of two.
#ifndef KERNEL
#define KERNEL "../../kernels/persistent.cu"
#endif
#include KERNEL
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifndef PREFIX
#define PREFIX 532
#endif
#define CHECK(call)                                                                       \
    do {                                                                                  \
        const cudaError_t e_ = (call);                                                    \
        if (e_ != cudaSuccess) printf("%s: %s\n", #call, cudaGetErrorString(e_)), exit(1); \
    } while (0)

constexpr int kLayers = 18, kSteps = 10, kHorizon = 50, kSuffix = kHorizon + 1, kCapacity = PREFIX + 300;

__device__ float uniform(size_t i, uint32_t seed) {
    uint32_t z = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    z ^= z >> 16, z *= 0x7feb352du, z ^= z >> 15, z *= 0x846ca68bu, z ^= z >> 16;
    return (z & 0xffffff) / 16777216.0f - 0.5f;
}
__global__ void fill(bf16* p, size_t n, float deviation, uint32_t seed) {
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x)
        p[i] = __float2bfloat16(uniform(i, seed) * 3.46f * deviation);
}
__global__ void fill(float* p, size_t n, float middle, float width, uint32_t seed) {
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n; i += static_cast<size_t>(gridDim.x) * blockDim.x)
        p[i] = middle + uniform(i, seed) * width;
}
__device__ unsigned long long hashes[kSteps];
// Of the residual's action rows, whatever the order of the blocks.
__global__ void hash(const float* h, int step) {
    unsigned long long sum = 0;
    for (int i = threadIdx.x + blockIdx.x * blockDim.x; i < kHorizon * kWidth; i += gridDim.x * blockDim.x) {
        unsigned long long z = (__float_as_uint(h[i]) ^ static_cast<unsigned long long>(i) << 32) * 0x9e3779b97f4a7c15ull;
        z ^= z >> 29, z *= 0xbf58476d1ce4e5b9ull;
        sum += z ^ z >> 32;
    }
    atomicAdd(&hashes[step], sum);
}

template <class T>
T* zeroed(size_t n) {
    T* p;
    CHECK(cudaMalloc(&p, n * sizeof(T) + 65536));
    CHECK(cudaMemset(p, 0, n * sizeof(T) + 65536));
    return p;
}
bf16* halves(size_t n, float deviation, uint32_t seed) {
    bf16* p = zeroed<bf16>(n);
    fill<<<1024, 256>>>(p, n, deviation, seed);
    return p;
}
float* floats(size_t n, float middle, float width, uint32_t seed) {
    float* p = zeroed<float>(n);
    fill<<<64, 256>>>(p, n, middle, width, seed);
    return p;
}

struct Harness {
    PersistentArgs args{};
    cudaStream_t stream;
    float* first_h;

    Harness() {
        std::vector<LayerArgs> layers(kLayers);
        for (int l = 0; l < kLayers; l++) {
            layers[l].qkv = halves(kQkvTiles * 8 * kWidth, 0.03f, l * 7 + 1), layers[l].out = halves(kWidth * kAttention, 0.02f, l * 7 + 2);
            layers[l].gate_up = halves(2 * kMlp * kWidth, 0.03f, l * 7 + 3), layers[l].down = halves(kWidth * kMlp, 0.015f, l * 7 + 4);
            layers[l].mid_scale = floats(kWidth, 1, 0.2f, l), layers[l].end_scale = floats(kWidth, 1, 0.2f, l + 99);
        }
        LayerArgs* table = zeroed<LayerArgs>(kLayers);
        CHECK(cudaMemcpy(table, layers.data(), kLayers * sizeof(LayerArgs), cudaMemcpyHostToDevice));
        constexpr int kPadded = kRow / 2;
        const size_t cached = static_cast<size_t>(kLayers) * kCapacity * kPadded;
        const DecodeParams params{halves(cached, 1, 501), halves(cached, 1, 502), static_cast<int64_t>(kCapacity) * kPadded, PREFIX, 0};
        DecodeParams* on_device = zeroed<DecodeParams>(1);
        CHECK(cudaMemcpy(on_device, &params, sizeof params, cudaMemcpyHostToDevice));
        args.layers = table, args.params = on_device;
        args.rope = reinterpret_cast<float2*>(floats(2048 * kHead, 0.5f, 1, 77));
        args.time_w = halves(kWidth * kWidth, 0.03f, 601), args.time_bias = floats(kWidth, 0, 0.1f, 602);
        args.first_scale = floats(kWidth, 1, 0.2f, 603), args.u = halves(kPanelRows * kWidth, 1, 604);
        args.hb = zeroed<bf16>(kPanelRows * kWidth), args.q = zeroed<bf16>(64 * kHeads * kPadded);
        args.suffix_keys = zeroed<bf16>(kLayers * kSuffix * kPadded), args.suffix_values = zeroed<bf16>(kLayers * kSuffix * kPadded);
        args.attended = zeroed<bf16>(kPanelRows * kAttention), args.gated = zeroed<bf16>(kPanelRows * kMlp);
        args.h = zeroed<float>(64 * kWidth), args.squares = zeroed<float>(64 * kWidthTiles), args.arrived = zeroed<uint32_t>(1);
        CHECK(cudaHostAlloc(&args.error, sizeof(uint32_t), 0));
        *args.error = 0;
        args.scale = 1.44269504f / 16, args.inv_width = 1.0f / kWidth;
        args.layer_count = kLayers, args.horizon = kHorizon, args.has_state = 1, args.suffix = kSuffix;
        first_h = floats(64 * kWidth, 0, 1, 605);
        CHECK(cudaStreamCreate(&stream));
        CHECK(cudaFuncSetAttribute(persistent_step, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Shared))));
    }
    cudaLaunchConfig_t shape(int clusters, cudaLaunchAttribute* attributes) const {
        attributes[0].id = cudaLaunchAttributeClusterDimension, attributes[0].val.clusterDim = {kRanks, 1, 1};
        attributes[1].id = cudaLaunchAttributeCooperative, attributes[1].val.cooperative = 1;
        cudaLaunchConfig_t c{};
        c.gridDim = clusters * kRanks, c.blockDim = kThreads, c.dynamicSmemBytes = sizeof(Shared), c.stream = stream;
        c.attrs = attributes, c.numAttrs = 2;
        return c;
    }
    int most_clusters() const {
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t c = shape(1, attributes);
        c.numAttrs = 1;
        int most;
        CHECK(cudaOccupancyMaxActiveClusters(&most, persistent_step, &c));
        return most;
    }
    // The same input at every step, so that all steps but the first, which has the state's row, end alike.
    cudaGraphExec_t graph(int clusters, int delay, bool hashed) const {
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        CHECK(cudaMemsetAsync(args.arrived, 0, sizeof(uint32_t), stream));
        CHECK(cudaMemcpyAsync(args.h, first_h, 64 * kWidth * 4, cudaMemcpyDeviceToDevice, stream));
        CHECK(cudaMemsetAsync(args.hb, 0, kPanelRows * kWidth * 2, stream));
        CHECK(cudaMemsetAsync(args.squares, 0, 64 * kWidthTiles * 4, stream));
        for (int step = 0; step < kSteps; step++) {
            PersistentArgs a = args;
            a.rows = kHorizon + (step == 0), a.barriers = step * 5 * kLayers, a.delay = delay;
            cudaLaunchAttribute attributes[2];
            const cudaLaunchConfig_t c = shape(clusters, attributes);
            CHECK(cudaLaunchKernelEx(&c, persistent_step, a));
            if (hashed) hash<<<50, 256, 0, stream>>>(args.h, step);
        }
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
};

#ifdef CLOCKS
// Clocks of one thread in one layer, by the blocks: what passes from each mark to the next.
static void tell_clocks(int blocks) {
    static uint32_t at[kMostBlocks][kMarks];
    CHECK(cudaMemcpyFromSymbol(at, clocks_of, sizeof at));
    const int shown = blocks / 2;
    std::vector<std::pair<int, int>> order;
    for (int m = 0; m < kMarks; m++)
        if (const int since = static_cast<int>(at[shown][m] - at[shown][0]); at[shown][m] != 0 && since >= 0) order.push_back({since, m});
    std::sort(order.begin(), order.end());
    int last = 0;
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
    printf("%zu bytes of shared memory, at most %d clusters, prefix of %d rows\n", sizeof(Shared), most, PREFIX);
    if (clusters.empty()) clusters = {most};
    unsigned long long expected[2] = {};
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
        tell_clocks(n * kRanks);
#endif
        for (const int delay : {0, 3000}) {
            const cudaGraphExec_t hashed = harness.graph(n, delay, true);
            int wrong = 0;
            for (int r = 0; r < runs; r++) {
                unsigned long long found[kSteps] = {};
                CHECK(cudaMemcpyToSymbol(hashes, found, sizeof found));
                harness.run(hashed);
                CHECK(cudaMemcpyFromSymbol(found, hashes, sizeof found));
                if (expected[0] == 0) expected[0] = found[0], expected[1] = found[1];
                for (int step = 0; step < kSteps; step++) wrong += found[step] != expected[step > 0];
            }
            printf("%3d blocks, up to %d ns of delay: %d of %d steps differ\n", n * kRanks, delay, wrong, runs * kSteps);
            failed |= wrong > 0;
        }
    }
    return failed;
}
