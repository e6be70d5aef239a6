// Camera bytes to SigLIP patches: pixel format, resize with padding, scaling to [-1, 1] and patch order in one pass.
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kMostViews = 8;
constexpr int kParams = 3;

struct ImageArgs {
    const uint8_t* bytes;    // rows `step` apart
    const int32_t* first;    // Pillow: [rw + rh] first source index of each output column, then row
    const int32_t* count;    // Pillow: [rw + rh] taps
    const int32_t* weights;  // Pillow: [rw + rh, taps] fixed point, 22 bits
    bf16* patches;           // [tokens, patch_stride] of this view
    const float* planes;     // [3, size, size] in [-1, 1] instead of bytes, or null
    int32_t width, height, step, pixel, red, green, blue;  // pixel: bytes; the rest: byte offsets of the channels
    int32_t size, resized_w, resized_h, left, top, patch, patch_stride, taps;
    int32_t resampler;       // 0: as it is (size × size), 1: Pillow bilinear, 2: bilinear without antialiasing
};

struct ImagesArgs {
    ImageArgs views[kMostViews];
    const float4* prompt;  // its embeddings, and where they go
    float4* prompt_to;
    int64_t prompt_count;
    uint64_t* params;  // what the trunk's kernels read of the cache, and what to write there
    uint64_t words[kParams];
};

__device__ __forceinline__ int clamp_byte(int v) { return min(max(v, 0), 255); }

// PIL's 8-bit resampler: horizontal pass rounded to bytes, then the vertical one (spec section 1). The horizontal
// bytes are computed again for each output row: the same integers, no buffer.
__device__ int pillow(const ImageArgs& a, int x, int y, int channel) {
    const int32_t* wx = a.weights + static_cast<size_t>(x) * a.taps;
    const int32_t* wy = a.weights + static_cast<size_t>(a.resized_w + y) * a.taps;
    const int x0 = a.first[x], nx = a.count[x], y0 = a.first[a.resized_w + y], ny = a.count[a.resized_w + y];
    int column = 1 << 21;
    for (int j = 0; j < ny; j++) {
        const uint8_t* p = a.bytes + static_cast<size_t>(y0 + j) * a.step + x0 * a.pixel + channel;
        int row = 1 << 21;
        for (int i = 0; i < nx; i++) row += wx[i] * p[i * a.pixel];
        column += wy[j] * clamp_byte(row >> 22);
    }
    return clamp_byte(column >> 22);
}

// torch's bilinear interpolation, align_corners false, on bytes scaled to [0, 1].
__device__ float bilinear(const ImageArgs& a, int x, int y, int channel) {
    const float sx = static_cast<float>(a.width) / a.resized_w, sy = static_cast<float>(a.height) / a.resized_h;
    // One rounding, as PyTorch's build has it.
    const float fx = fmaxf(__fmaf_rn(sx, x + 0.5f, -0.5f), 0.0f), fy = fmaxf(__fmaf_rn(sy, y + 0.5f, -0.5f), 0.0f);
    const int x0 = min(static_cast<int>(fx), a.width - 1), y0 = min(static_cast<int>(fy), a.height - 1);
    const int x1 = min(x0 + 1, a.width - 1), y1 = min(y0 + 1, a.height - 1);
    const float lx = fx - x0, ly = fy - y0;
    auto at = [&](int yy, int xx) {
        return a.bytes[static_cast<size_t>(yy) * a.step + xx * a.pixel + channel] / 255.0f;
    };
    const float upper = (1.0f - lx) * at(y0, x0) + lx * at(y0, x1);
    const float lower = (1.0f - lx) * at(y1, x0) + lx * at(y1, x1);
    return fminf(fmaxf((1.0f - ly) * upper + ly * lower, 0.0f), 1.0f);
}

// One thread per pixel and channel of the square image, one row of blocks per view. The first row also puts in place what else
// an encode begins with, which saves two copies in front of it.
extern "C" __global__ void __launch_bounds__(kThreads, 6) image_patches(const __grid_constant__ ImagesArgs all) {
    const ImageArgs& a = all.views[blockIdx.y];
    const int id = blockIdx.x * kThreads + threadIdx.x;
    if (blockIdx.y == 0) {
        for (int64_t i = id; i < all.prompt_count; i += static_cast<int64_t>(gridDim.x) * kThreads) all.prompt_to[i] = all.prompt[i];
        if (id < kParams) all.params[id] = all.words[id];
    }
    if (id >= 3 * a.size * a.size) return;
    // Channels innermost: neighbouring threads read neighbouring bytes.
    const int c = id % 3, x = id / 3 % a.size, y = id / 3 / a.size;
    float v;
    if (a.planes) {
        v = a.planes[(static_cast<size_t>(c) * a.size + y) * a.size + x];
    } else {
        const int channel = c == 0 ? a.red : c == 1 ? a.green : a.blue;
        const int rx = x - a.left, ry = y - a.top;
        if (rx < 0 || ry < 0 || rx >= a.resized_w || ry >= a.resized_h)
            v = -1.0f;
        else if (a.resampler == 2)
            v = bilinear(a, rx, ry, channel) * 2.0f - 1.0f;
        else {
            const int byte = a.resampler == 1 ? pillow(a, rx, ry, channel)
                                              : a.bytes[static_cast<size_t>(ry) * a.step + rx * a.pixel + channel];
            v = byte / 255.0f * 2.0f - 1.0f;
        }
    }
    const int side = a.size / a.patch, token = y / a.patch * side + x / a.patch;
    if (x / a.patch >= side || y / a.patch >= side) return;
    a.patches[static_cast<size_t>(token) * a.patch_stride + (c * a.patch + y % a.patch) * a.patch + x % a.patch] =
        __float2bfloat16(v);
}
