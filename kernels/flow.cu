// Between two evaluations of the velocity: output projection, guidance, Euler step, and the way back in. For the decoder by
// launches; the persistent one has its own (persistent_flow.cuh).
//
// One block per token row, all in float32. Rows 0..horizon are actions; row `horizon` is the state token, which is
// written once, before the first step.
#include "common.cuh"

struct FlowArgs {
    float* x;               // [horizon, action_dim], kept in float32 over the steps
    float* velocities;      // [horizon, action_dim] of the step that ends here
    const float* noise;     // [horizon, action_dim]
    const float* previous;  // [horizon, action_dim], zero where absent
    const float* weights;   // [horizon] guidance weights
    const float* gains;     // [steps] guidance gains
    const float* state;     // [state_dim]
    const DecodeParams* params;
    float* h;               // [64, width]
    bf16* hb;               // panel of h·scale
    bf16* u;                // panel of SiLU(in-projection), the second time layer's input
    float* squares;         // partial sums of squares of each row
    const float* out_w;     // [action_dim, width]
    const float* out_b;     // [action_dim]
    const float* out_scale;  // [width] of the final norm
    const float* in_w;      // [action_dim, width]: transposed
    const float* in_b;      // [width]
    const float* state_w;   // [state_dim, width]: transposed
    const float* state_b;   // [width]
    const float* scale;     // [width] of the first norm
    float inv_width, time, dt;
    int32_t width, horizon, action_dim, state_dim, stride;
    int32_t square_tiles;   // partial sums of a row, 64 apart
    int32_t step;           // the step that ends here; -1 before the first
    int32_t last;           // 1: only the output side
    int32_t direct;         // 1: the in-projection is the token itself (π0.5)
};

extern "C" __global__ void __launch_bounds__(256) flow_step(const __grid_constant__ FlowArgs a) {
    extern __shared__ float scaled[];  // [width]
    __shared__ float scratch[33], sx[128];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n = blockIdx.x;
    grid_launch_dependents();
    grid_wait();
    const bool action = n < a.horizon;
    if (!action) {
        for (int i = tid; i < a.state_dim; i += 256) sx[i] = a.state[i];
    } else if (a.step < 0) {
        for (int i = tid; i < a.action_dim; i += 256) a.x[n * a.action_dim + i] = sx[i] = a.noise[n * a.action_dim + i];
    } else {
        float sum = 0.0f;
        for (int k = tid; k < a.width; k += 256) {
            const float v = a.h[static_cast<size_t>(n) * a.width + k];
            sum += v * v;
            scaled[k] = v * a.out_scale[k];
        }
        const float rinv = rsqrtf(block_sum(sum, scratch) * a.inv_width + 1e-6f);
        for (int i = warp; i < a.action_dim; i += 8) {
            const float* w = a.out_w + static_cast<size_t>(i) * a.width;
            float dot = 0.0f;
            for (int k = lane * 4; k < a.width; k += 128) {
                const float4 wv = *reinterpret_cast<const float4*>(w + k);
                dot += wv.x * scaled[k] + wv.y * scaled[k + 1] + wv.z * scaled[k + 2] + wv.w * scaled[k + 3];
            }
            dot = warp_sum(dot);
            if (lane == 0) {
                const int at = n * a.action_dim + i;
                float v = rinv * dot + a.out_b[i];
                a.velocities[at] = v;
                const float x = a.x[at];
                if (a.params->guided) {
                    const float target = x - a.time * v;
                    v -= a.gains[a.step] * (a.weights[n] * (a.previous[at] - target));
                }
                a.x[at] = sx[i] = x + a.dt * v;
            }
        }
    }
    if (a.last) return;
    __syncthreads();
    const float* w = action ? a.in_w : a.state_w;
    const float* b = action ? a.in_b : a.state_b;
    const int inputs = action ? a.action_dim : a.state_dim;
    float sum = 0.0f;
    for (int j = tid; j < a.width; j += 256) {
        float v = b[j];
        for (int i = 0; i < inputs; i++) v += w[static_cast<size_t>(i) * a.width + j] * sx[i];
        if (action && !a.direct) {
            a.u[panel(n, j, a.stride)] = __float2bfloat16(silu(v));
        } else {
            a.h[static_cast<size_t>(n) * a.width + j] = v;
            a.hb[panel(n, j, a.stride)] = __float2bfloat16(v * a.scale[j]);
            sum += v * v;
        }
    }
    if (!action || a.direct) {
        sum = block_sum(sum, scratch);
        for (int i = tid; i < a.square_tiles; i += 256) a.squares[i * 64 + n] = i == 0 ? sum : 0.0f;
    }
}
