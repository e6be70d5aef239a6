// Between two steps of the persistent decoder: output projection, guidance, Euler step, and the way back in, as in flow.cu.
#pragma once
#include "persistent.cuh"

constexpr int kMostInputs = 128;  // action_dim and state_dim at most
constexpr int kTogether = 2;      // token rows of a cluster that share loaded weights
constexpr int kInputs = 32;       // of the in-projection, whose weights are loaded at once

// Lies in `acts`.
struct FlowBuffers {
    float x[kPanelRows][kMostInputs];  // of this cluster's token rows, from all ranks
    float scaled[kTogether][kWidth];
    float squares[kTogether][8];  // by warp
};
static_assert(sizeof(FlowBuffers) <= kActs, "the flow's buffers fit");

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A cluster has token rows cluster, cluster + clusters, ...; of each a rank has a quarter of the outputs, a dot product a
// warp, and then, of the in-projection, a quarter of the columns, one a thread. Weights of the former are on their way before
// the barrier, of the latter while the ranks exchange what they have; as many as the published model has are loaded once for
// all rows. Loops over rows are not unrolled: the code runs once a step.
template <class U>
struct Flow {
    const PersistentArgs& a;
    Shared<U>& s;
    const int rank, cluster, clusters, step, tid, lane, warp, column;

    __device__ __forceinline__ Flow(const PersistentArgs& a, Shared<U>& s, int rank, int cluster, int clusters, int step)
        : a(a), s(s), rank(rank), cluster(cluster), clusters(clusters), step(step), tid(threadIdx.x), lane(threadIdx.x % 32),
          warp(of_warp(threadIdx.x / 32)), column(rank * kComputing + threadIdx.x) {}

    __device__ __forceinline__ void load_output(float4 (&w)[8], int i) const {
        const float* from = a.out_w + i * kWidth + lane * 4;
#pragma unroll
        for (int j = 0; j < 8; j++) w[j] = load4(from + j * 128);
    }

    // Step step - 1 ends, step `step` begins: at either end there is but one of them.
    __device__ __forceinline__ void run(uint32_t acts_parity) const {
        FlowBuffers& b = *reinterpret_cast<FlowBuffers*>(s.acts);
        const bool last = step == a.step_count;
        const int before = max(step - 1, 0), actions = static_cast<uint32_t>(a.horizon + clusters - 1 - cluster) / clusters;
        const bool state = step == 0 && a.has_state && cluster + actions * clusters == a.horizon;
        const StepArgs &ended = a.steps[before], &begun = a.steps[min(step, a.step_count - 1)];
        const Span outputs(a.action_dim, rank, kRanks);
        const float* const out_bias = ended.out_bias;
        const float time = ended.time, gain = a.gains[before];
        const float4 out_scale = load4(ended.out_scale + 4 * tid);
        const float in_bias = begun.in_bias[column], scale = begun.scale[column];
        const bool guided = a.params->guided;
        float4 out[8];
        load_output(out, min(outputs.first + warp, a.action_dim - 1));
        if (tid == 0 && !last) barrier_expect(&s.x_received, (actions * a.action_dim + (state ? a.state_dim : 0)) * 4);
        // All that the phase before wrote is there.
        barrier_wait(&s.acts_full[0], acts_parity);
        if (state && tid < a.state_dim) send(remote_address(&b.x[actions][tid], rank), a.state[tid], remote_address(&s.x_received, rank));
#pragma unroll 1
        for (int r = 0; r < actions; r += kTogether) {
            const int here = min(kTogether, actions - r);
            if (step > 0) {
                if (r > 0) meet(1, kComputing);
#pragma unroll
                for (int k = 0; k < kTogether; k++) {
                    const int n = cluster + (r + min(k, here - 1)) * clusters;
                    const float4 v = __ldcg(reinterpret_cast<const float4*>(a.h + n * kWidth) + tid), o = out_scale;
                    *reinterpret_cast<float4*>(&b.scaled[k][4 * tid]) = make_float4(v.x * o.x, v.y * o.y, v.z * o.z, v.w * o.w);
                    const float squares = warp_sum((v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w));
                    if (lane == 0) b.squares[k][warp] = squares;
                }
                meet(1, kComputing);
            }
            // A lane moves one of the rows on.
            const int k = min(lane, here - 1), n = cluster + (r + k) * clusters;
#pragma unroll 1
            for (int i = outputs.first + warp; i < outputs.last; i += 8) {
                const int at = n * a.action_dim + i;
                float x = __ldcg((step > 0 ? a.x : a.noise) + at);
                if (i >= outputs.first + 8 || (r > 0 && outputs.last > outputs.first + 8)) load_output(out, i);
                if (step > 0) {
                    const float bias = out_bias[i], previous = guided ? a.previous[at] : 0.0f, weight = guided ? a.guidance[n] : 0.0f;
                    float dot = 0.0f;
#pragma unroll 1
                    for (int row = 0; row < here; row++) {
                        float sum = 0.0f;
#pragma unroll
                        for (int j = 0; j < 8; j++) {
                            const float4 w = out[j], h = load4(&b.scaled[row][j * 128 + lane * 4]);
                            sum += w.x * h.x + w.y * h.y + w.z * h.z + w.w * h.w;
                        }
                        sum = warp_sum(sum);
                        if (row == lane) dot = sum;
                    }
                    const float4 p = load4(b.squares[k]), q = load4(b.squares[k] + 4);
                    const float squares = ((p.x + p.y) + (p.z + p.w)) + ((q.x + q.y) + (q.z + q.w));
                    float v = rsqrtf(squares * a.inv_width + kEps) * dot + bias;
                    if (lane < here) a.velocities[before * a.horizon * a.action_dim + at] = v;
                    if (guided) v -= gain * (weight * (previous - (x - time * v)));
                    x += a.dt * v;
                }
                if (lane < here) {
                    a.x[at] = x;
#pragma unroll
                    for (int c = 0; c < kRanks; c++)
                        if (!last) send(remote_address(&b.x[r + lane][i], c), x, remote_address(&s.x_received, c));
                }
                __syncwarp();
            }
        }
        if (last) return;
        float in[kInputs] = {};
#pragma unroll 1
        for (int r = 0; r < actions + state; r++) {
            const bool action = r < actions;
            const int inputs = action ? a.action_dim : a.state_dim, n = cluster + r * clusters;
            float v = action ? in_bias : a.state_b[column];
#pragma unroll 1
            for (int first = 0; first < inputs; first += kInputs) {
                const int left = inputs - first;
                if (r == 0 || !action || inputs > kInputs) {
                    const float* from = (action ? a.in_w : a.state_w) + first * kWidth + column;
#pragma unroll
                    for (int i = 0; i < kInputs; i++) in[i] = i < left ? from[i * kWidth] : 0.0f;
                }
                // What all ranks have sent is there: none of them reads these rows of the residual any more.
                barrier_wait(&s.x_received, step & 1);
#pragma unroll
                for (int i = 0; i < kInputs; i += 4) {
                    const float4 x = load4(&b.x[r][first + i]);
                    // What lies behind the inputs may be anything.
                    if (i < left) v += in[i] * x.x;
                    if (i + 1 < left) v += in[i + 1] * x.y;
                    if (i + 2 < left) v += in[i + 2] * x.z;
                    if (i + 3 < left) v += in[i + 3] * x.w;
                }
            }
            if (action && a.time_w) {
                a.u[panel(n, column, kPanelRows)] = __float2bfloat16(silu(v));
                continue;
            }
            a.h[n * kWidth + column] = v;
            a.hb[0][panel(n, column, kPanelRows)] = __float2bfloat16(v * scale);
            float squares = v * v;
#pragma unroll
            for (int m = 1; m < 8; m <<= 1) squares += __shfl_xor_sync(0xffffffffu, squares, m);
            if (lane % 8 == 0) a.squares[0][squares_at(n, column / 8)] = squares;
        }
        // Copies of the next phase overwrite what was written here.
        fence_async_shared();
    }
};

#endif
