// What the fine stage needs beside matrix products and attention (those are cuBLAS and PyTorch). A block a frame of a
// window; B windows of T frames, K codebooks.
#include "norm.cuh"

constexpr int CODES = BOOK_SIZE / THREADS;  // codes a thread draws from
static_assert(BOOK_SIZE % THREADS == 0, "a codebook is dealt evenly to a block's threads");

// codes [B][K][T], tables [K][ids][W] -> x [B T][W]: codebooks 0..k of each frame and its position, and their norm.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const int* codes, const u16* tables, const float* positions, int n_books, int n_ids, int n_frames, int k,
          float* x, u16* normed) {
    int window = blockIdx.x / n_frames, frame = blockIdx.x % n_frames;
    float mine[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int column = threadIdx.x + i * THREADS;
        if (column < W) mine[i] = positions[(size_t)frame * W + column];
    }
    for (int book = 0; book <= k; book++) {
        int code = codes[(window * n_books + book) * n_frames + frame];
        const u16* row = tables + ((size_t)book * n_ids + code) * W;
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            int column = threadIdx.x + i * THREADS;
            if (column < W) mine[i] += bf16(row[column]);
        }
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int column = threadIdx.x + i * THREADS;
        if (column < W) x[(size_t)blockIdx.x * W + column] = mine[i];
    }
    write_normed(normed, mine);
}

struct Best {
    float value;
    int index;
};

__device__ __forceinline__ Best better(Best a, Best b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
}

// The largest of a block's values, and the first index that has it.
__device__ __forceinline__ Best best_of_block(Best best) {
    __shared__ Best bests[WARPS];
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        best = better(best, {__shfl_xor_sync(~0u, best.value, offset), __shfl_xor_sync(~0u, best.index, offset)});
    if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) best = better(best, bests[i]);
    return best;
}

// Sum of x over the block's threads up to this one; `total` over all of them.
__device__ __forceinline__ float running_sum(float x, float& total) {
    __shared__ float sums[WARPS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        float before = __shfl_up_sync(~0u, x, offset);
        if (lane >= offset) x += before;
    }
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    float carried = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) carried += sums[i];
        total += sums[i];
    }
    return carried + x;
}

// logits [B T][BOOK_SIZE] + bias -> codes[.][k][.]: how many steps of the cumulative distribution lie below
// uniform * its end (temperature 0: argmax). Frames before fill_from, and from n_valid on, stay.
extern "C" __global__ void __launch_bounds__(THREADS)
    draw(const float* logits, const float* bias, const float* uniforms, const float* temperatures, const int* fill_from,
         const int* n_valid, int n_books, int n_given, int n_frames, int k, int* codes) {
    __shared__ float scratch[WARPS];
    int window = blockIdx.x / n_frames, frame = blockIdx.x % n_frames, first = threadIdx.x * CODES;
    if (frame < fill_from[window] || frame >= n_valid[window]) return;  // the whole block
    float temperature = temperatures[window], mine[CODES], total;
    Best best = {-1e30f, 0};
#pragma unroll
    for (int i = 0; i < CODES; i++) {
        mine[i] = logits[(size_t)blockIdx.x * BOOK_SIZE + first + i] + bias[first + i];
        best = better(best, {mine[i], first + i});
    }
    best = best_of_block(best);
    int token = best.index;
    if (temperature > 0) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < CODES; i++) sum += mine[i] = expf((mine[i] - best.value) / temperature);
        float cumulated = running_sum(sum, total) - sum, below = 0;
        int drawn = k - n_given, n_drawn = n_books - n_given;
        float mark = uniforms[(window * n_drawn + drawn) * n_frames + frame] * total;
#pragma unroll
        for (int i = 0; i < CODES; i++) below += (cumulated += mine[i]) < mark ? 1.f : 0.f;
        token = min((int)sum_of_block(below, scratch), BOOK_SIZE - 1);
    }
    if (threadIdx.x == 0) codes[(window * n_books + k) * n_frames + frame] = token;
}
