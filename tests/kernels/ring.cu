// The ring through which decode.cu and wide.cu read their weights, alone: a warp copies, others add up. For tests/sanitize.py.
#include "ptx.cuh"

constexpr int STAGES = 4, READERS = 4, STAGE_WORDS = 256;  // READERS: warps
// How it is done: completion is handed on by the copying warp (decode.cu), or waited for where it comes (wide.cu). And a mistake:
// readers that read before they wait, or that let their stage go before they have read.
enum { NONE, READS_FIRST, LETS_GO_FIRST };

extern "C" __global__ void __launch_bounds__(READERS * 32 + 32) ring(const u32* from, int n, u32* sums) {
    __shared__ __align__(128) u32 stages[STAGES][STAGE_WORDS];
    __shared__ u64 full[STAGES], landed[STAGES], empty[STAGES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1), barrier_init(&landed[i], 1);
            barrier_init(&empty[i], READERS * ARRIVING_LANES);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (warp == READERS) {
        if (lane) return;
        auto land = [&](int i) {
            barrier_wait(&landed[i % STAGES], i / STAGES & 1);
            barrier_arrive(&full[i % STAGES]);
        };
        for (int i = 0; i < n; i++) {
            barrier_wait(&empty[i % STAGES], (i / STAGES & 1) ^ 1);
            u64* barrier = HANDED_ON ? &landed[i % STAGES] : &full[i % STAGES];
            barrier_expect(barrier, STAGE_WORDS * 4);
            copy_once_to_shared(stages[i % STAGES], from + i * STAGE_WORDS, STAGE_WORDS * 4, barrier);
            if (HANDED_ON && i) land(i - 1);
        }
        if (HANDED_ON) land(n - 1);
        return;
    }
    u32 sum = 0;
    for (int i = 0; i < n; i++) {
        if (MISTAKE != READS_FIRST) barrier_wait(&full[i % STAGES], i / STAGES & 1);
        auto let_go = [&] {
            __syncwarp();
            if (lane < ARRIVING_LANES) barrier_arrive(&empty[i % STAGES]);
        };
        if (MISTAKE == LETS_GO_FIRST) let_go();
        for (int j = lane; j < STAGE_WORDS; j += 32) sum += stages[i % STAGES][j] * (warp + 1);
        if (MISTAKE == READS_FIRST) barrier_wait(&full[i % STAGES], i / STAGES & 1);
        if (MISTAKE != LETS_GO_FIRST) let_go();
    }
    sums[threadIdx.x] = sum;
}
