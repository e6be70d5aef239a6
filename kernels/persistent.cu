// All flow-matching steps in one cooperative kernel: blocks stay on their SMs and meet at grid barriers.
//
// A block is eight warps that compute and two that fetch. One keeps a ring of pieces filled, in the order of their use and
// across barriers and steps: weights, and the prefix's keys and values. The other waits at the grid barrier and brings the
// activations of the next phase. Four blocks form a cluster. Products are cut by columns over clusters and by K over the blocks of a
// cluster, which send each other their sums; gate/up, and QKV where clusters are few, has all of K in every block instead. Which
// block does a piece depends on the number of blocks; slices of K and the order of sums do not, so results do not.
//
// A step: flow (persistent_flow.cuh) | time, for π0 | layers. A layer: QKV | attention | O | gate, up | down. There is a
// barrier at each stroke and at the end, and the flow once more after the last step. Behind QKV, attention and gate/up a
// block waits only for those whose results it reads; what O and down write is not what slower blocks may still read (hb,
// squares: two of each), and behind those two everybody waits for all.
#include "persistent_compute.cuh"
#include "persistent_fetch.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void whole_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

#endif

template <int PIECES, int WIDE>
__device__ __forceinline__ void decode(const PersistentArgs& a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using U = Units<WIDE>;
    static_assert(PIECES <= U::kStages || PIECES == kMostKeys);
    static_assert(sizeof(Shared<U>) <= kShared, "more than an SM has");
    Shared<U>& s = *reinterpret_cast<Shared<U>*>(shared_memory);
    const int rank = blockIdx.x % kRanks, cluster = blockIdx.x / kRanks, clusters = gridDim.x / kRanks;
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(s.ring) / 16); i += kThreads) store_zero_16(s.ring[0] + i * 16);
    if (threadIdx.x == 0) {
        for (int i = 0; i < U::kStages; i++) barrier_init_n(&s.full[i], 1), barrier_init_n(&s.empty[i], 8);
        for (int i = 0; i < 4; i++) barrier_init_n(&s.acts_full[i], 1);
        for (int i = 0; i < 2; i++) barrier_init_n(&s.received[i], 1), barrier_init_n(&s.inbox_free[i], kRanks);
        barrier_init_n(&s.queries_full, 1), barrier_init_n(&s.queries_free, 1);
        barrier_init_n(&s.parts_received, 1), barrier_init_n(&s.parts_free, kRanks), barrier_init_n(&s.x_received, 1);
        barrier_init_n(&s.values_full, 1), barrier_init_n(&s.finished, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    fence_async();
    whole_cluster();
    const int role = of_warp(threadIdx.x / 32);
    if (role < kComputing / 32)
        Compute<PIECES, U>(a, s, rank, cluster, clusters).run();
    else if (role == kComputing / 32)
        Producer<U>(a, s).run(rank, cluster, clusters);
    else
        Loader<U>(a, s).run(rank, cluster, clusters);
    __syncwarp();
    // Nobody leaves while others may still send to it.
    whole_cluster();
#endif
}

// grid: clusters·4 blocks that are all on the chip at once. One for each number of pieces of keys that a rank has at most and of
// tiles of a unit: code that never runs takes time from what does.
#define PERSISTENT_DECODE(PIECES, WIDE)                                              \
    extern "C" __global__ void __launch_bounds__(kThreads, 1)                        \
        persistent_decode_##PIECES##_##WIDE(const __grid_constant__ PersistentArgs a) { \
        decode<PIECES, WIDE>(a);                                                     \
    }
PERSISTENT_DECODE(3, 9)
PERSISTENT_DECODE(5, 9)
PERSISTENT_DECODE(5, 10)
PERSISTENT_DECODE(5, 11)
PERSISTENT_DECODE(23, 9)
PERSISTENT_DECODE(23, 10)
PERSISTENT_DECODE(23, 11)
