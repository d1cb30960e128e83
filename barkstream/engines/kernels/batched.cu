// What a decode step of many rows needs beside matrix products (those are cuBLAS): one CUDA graph a step, rows of
// different lengths.
#include "cache.cuh"
#include "norm.cuh"
#include "sampling.cuh"

constexpr int H = N_HEADS;

struct RowState {
    int length, ids[2], n_drawn, running, ended;
};

// One block a row: the embeddings of the position to feed, x [rows][W], and their norm.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const RowState* states, const u16* embedding, const float* positions, float* x, u16* normed) {
    const RowState row = states[blockIdx.x];
    float mine[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int column = threadIdx.x + i * THREADS;
        if (column >= W) continue;
        mine[i] = bf16(embedding[(size_t)row.ids[0] * W + column]) + bf16(embedding[(size_t)row.ids[1] * W + column]) +
                  positions[(size_t)row.length * W + column];
        x[blockIdx.x * W + column] = mine[i];
    }
    write_normed(normed, mine);
}

// One block a token of a prefill, n_tokens a row: its keys and values into the cache.
extern "C" __global__ void __launch_bounds__(THREADS)
    store(const int* slots, const u32* qkv, u8* cache, float* scales, int n_slots, int layer, int n_tokens) {
    int position = blockIdx.x % n_tokens;
    for (int i = threadIdx.x; i < W; i += THREADS) {  // W words: keys, then values; a head's are a warp's
        int kind = i / (W / 2), word = i % (W / 2);
        size_t head = ((size_t)(layer * 2 + kind) * n_slots + slots[blockIdx.x / n_tokens]) * H + word / 32;
        u32 pair = qkv[(size_t)blockIdx.x * (3 * W / 2) + W / 2 + i];
        u8* eight = cache + head * BLOCK_SIZE * CACHED + cached_at(position, word % 32 / 4);
        if (!BYTES_CACHED) {
            ((u32*)eight)[word % 4] = pair;
            continue;
        }
        float x = low_bf16(pair), y = high_bf16(pair), most = fmaxf(fmaxf(fabsf(x), fabsf(y)), 1e-20f);
#pragma unroll
        for (int offset = 16; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
        float by = 127 / most;
        ((u16*)eight)[word % 4] = (u16)pack_bytes(x * by, y * by, -128, -128);
        if (word % 32 == 0) scales[head * BLOCK_SIZE + position] = most / 127;
    }
}

#if CACHE_BITS == 16  // what reads 8 bits are the fused kernels
__device__ __forceinline__ void unpack(float (&v)[8], const uint4& words) {
    v[0] = low_bf16(words.x), v[1] = high_bf16(words.x), v[2] = low_bf16(words.y), v[3] = high_bf16(words.y);
    v[4] = low_bf16(words.z), v[5] = high_bf16(words.z), v[6] = low_bf16(words.w), v[7] = high_bf16(words.w);
}

// One block a (head, row): the new position's keys and values into the cache, attention over the row's true length.
// A warp takes 4 positions at a time, 8 lanes and 16 bytes each, UNROLL times before it looks at any of them.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend(const Row* rows, const RowState* states, const u16* qkv, u8* cache, int n_slots, int layer, u16* out) {
    constexpr int UNROLL = 4;
    __shared__ float part[WARPS][64], peaks[WARPS], sums[WARPS];
    int head = blockIdx.x, b = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, d8 = lane % 8 * 8,
        length = states[b].length;
    u8 *keys = cache + ((size_t)(layer * 2 * n_slots + rows[b].slot) * H + head) * BLOCK_SIZE * CACHED,
       *values = keys + (size_t)n_slots * H * BLOCK_SIZE * CACHED;
    int eight = d8 / 8;
    const u16* mine = qkv + (size_t)b * 3 * W + head * 64 + d8;
    float q[8], peak = -1e30f, sum = 0, acc[8] = {};
    if (!states[b].running) return;
    unpack(q, *(const uint4*)mine);
    uint4 new_key = *(const uint4*)(mine + W), new_value = *(const uint4*)(mine + 2 * W);
    if (threadIdx.x < 8)
        *(uint4*)(keys + cached_at(length, eight)) = new_key, *(uint4*)(values + cached_at(length, eight)) = new_value;
    for (int first = warp * 4 + lane / 8; first < ((length + 4) & ~3); first += WARPS * 4 * UNROLL) {
        uint4 key[UNROLL], value[UNROLL];
        float score[UNROLL], highest = peak;
#pragma unroll
        for (int j = 0; j < UNROLL; j++) {
            int position = first + j * WARPS * 4;
            key[j] = new_key, value[j] = new_value;
            if (position < length)
                key[j] = load_cached_l2(keys + cached_at(position, eight)),
                value[j] = load_cached_l2(values + cached_at(position, eight));
        }
#pragma unroll
        for (int j = 0; j < UNROLL; j++) {
            float k[8];
            unpack(k, key[j]);
            score[j] = 0;
#pragma unroll
            for (int d = 0; d < 8; d++) score[j] = fmaf(q[d], k[d], score[j]);
#pragma unroll
            for (int offset = 1; offset < 8; offset *= 2) score[j] += __shfl_xor_sync(~0u, score[j], offset);
            score[j] = first + j * WARPS * 4 <= length ? score[j] * (0.125f * 1.44269504f) : -1e30f;
            highest = fmaxf(highest, score[j]);
        }
        float rescale = exp2f(peak - highest);
        peak = highest, sum *= rescale;
#pragma unroll
        for (int d = 0; d < 8; d++) acc[d] *= rescale;
#pragma unroll
        for (int j = 0; j < UNROLL; j++) {
            float weight = first + j * WARPS * 4 <= length ? exp2f(score[j] - peak) : 0, v[8];
            unpack(v, value[j]);
            sum += weight;
#pragma unroll
            for (int d = 0; d < 8; d++) acc[d] = fmaf(weight, v[d], acc[d]);
        }
    }
    float highest = fmaxf(peak, __shfl_xor_sync(~0u, peak, 8));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 16));
    float rescale = exp2f(peak - highest);
    sum *= rescale;
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
#pragma unroll
    for (int d = 0; d < 8; d++) {
        acc[d] *= rescale;
        acc[d] += __shfl_xor_sync(~0u, acc[d], 8);
        acc[d] += __shfl_xor_sync(~0u, acc[d], 16);
        if (lane < 8) part[warp][d8 + d] = acc[d];
    }
    if (lane == 0) peaks[warp] = highest, sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        float top = -1e30f, total = 0, x = 0, y = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) top = fmaxf(top, peaks[i]);
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            float weight = exp2f(peaks[i] - top);
            total = fmaf(weight, sums[i], total);
            x = fmaf(weight, part[i][2 * lane], x), y = fmaf(weight, part[i][2 * lane + 1], y);
        }
        ((u32*)out)[((size_t)b * W + head * 64) / 2 + lane] = pack_bf16(x / total, y / total);
    }
}
#endif

// One block a row: draw its token from logits [rows][N_BOOKS * BOOK_SIZE] and advance its state.
extern "C" __global__ void __launch_bounds__(1024)
    sample(const Row* rows, RowState* states, const float* logits, int* tokens) {
    constexpr int ALL_WARPS = 32, N = (BOOK_SIZE + 8191) / 8192 * 8;
    __shared__ float scratch[ALL_WARPS];
    __shared__ Candidate candidates[ALL_WARPS];
    const Row row = rows[blockIdx.x];
    const RowState before = states[blockIdx.x];
    if (!before.running) return;
    int position = row.position + before.n_drawn, book = position % N_BOOKS;
    const float* mine = logits + (size_t)blockIdx.x * (N_BOOKS * BOOK_SIZE) + book * BOOK_SIZE;
    float x[N];
    int first = threadIdx.x * 8;  // noise comes in blocks of 8: thread t has entries 8 t ..., 8 (t + 1024) ...
#pragma unroll
    for (int i = 0; i < N; i++) {
        int index = first + i / 8 * 8192 + i % 8;
        x[i] = index < BOOK_SIZE ? mine[index] : NEVER;
    }
    if (row.top_p < 1 || row.top_k > 0) {
        u32 least = smallest_kept<ALL_WARPS>(x, row, scratch, 1);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (ordered(x[i]) < least) x[i] = NEVER;
    }
    Candidate best = nothing();
#pragma unroll
    for (int i = 0; i < N; i += 8) {
        float noise[8] = {};
        int index = first + i / 8 * 8192;
        if (index >= BOOK_SIZE) break;
        if (row.temperature != 0) gumbel_block(noise, row.seed, STAGE, position, index / 8);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (index + j < BOOK_SIZE) best = combine(best, consider(x[i + j], noise[j], index + j, END, row));
    }
    best = combine_warp(best);
    if (threadIdx.x % 32 == 0) candidates[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = combine_warp(candidates[threadIdx.x]);
    if (threadIdx.x) return;
    RowState state = before;
    state.ended = ends(best, END, row);
    if (!state.ended) tokens[blockIdx.x * BLOCK_SIZE + state.n_drawn++] = best.index;
    state.running = !state.ended && state.n_drawn < row.n_tokens;
    if (state.running) state.length++, state.ids[0] = FIRST_ID + book * BOOK_SIZE + best.index, state.ids[1] = NO_ID;
    states[blockIdx.x] = state;
}
