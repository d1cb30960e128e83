// What the two persistent kernels share, decode.cu (up to 8 rows) and wide.cu (8 to 64).
#pragma once
#include "cache.cuh"
#include "packets.cuh"
#include "sampling.cuh"

constexpr int W = WIDTH, H = N_HEADS, B = N_ROWS, BLOCKS = 8 * H, WARPS = 8, THREADS = WARPS * 32;
constexpr int SLICES = W / 32, PAIRS = (SLICES + WARPS - 1) / WARPS;  // slices of k, 32 wide, and how many a warp takes
constexpr bool EVEN = SLICES % WARPS == 0;
constexpr int UNIT = 8 * W * BITS / 8;  // the bytes of 8 rows of W weights
// The units of a block b = 8 * head + rank, in their order in memory (`pack_units` of fused.py)
constexpr int OUT_UNIT = 3, UP_UNIT = 4, DOWN_UNIT = 8, LAYER_UNITS = 12, HEAD_UNITS = 2 * HEAD_TILES;
constexpr int ALL_UNITS = N_LAYERS * LAYER_UNITS + N_BOOKS * HEAD_UNITS;
static_assert(W == 64 * H);

constexpr bool QUANTIZED = BITS == 8;  // weights
static_assert(BYTES_CACHED || !QUANTIZED);

// What blocks exchange, and multiply, two to a word: bf16, or f16 in a quantized model, whose bytes become f16 in fewer instructions.
__device__ __forceinline__ u32 pack_pair(float low, float high) {
    return QUANTIZED ? pack_f16(low, high) : pack_bf16(low, high);
}
__device__ __forceinline__ float low_of(u32 pair) { return QUANTIZED ? low_f16(pair) : low_bf16(pair); }
__device__ __forceinline__ float high_of(u32 pair) { return QUANTIZED ? high_f16(pair) : high_bf16(pair); }
constexpr u32 ONES = QUANTIZED ? 0x3c003c00u : 0x3f803f80u;
// What attention multiplies: as cached bytes become, f16, or bf16 as they are cached. Queries come as what blocks exchange.
__device__ __forceinline__ u32 as_attended(u32 pair) {
    return BYTES_CACHED && !QUANTIZED ? pack_f16(low_bf16(pair), high_bf16(pair)) : pair;
}
__device__ __forceinline__ u32 pack_attended(float low, float high) {
    return BYTES_CACHED ? pack_f16(low, high) : pack_bf16(low, high);
}
constexpr u32 ATTENDED_ONES = BYTES_CACHED ? 0x3c003c00u : 0x3f803f80u;

__device__ __forceinline__ uint4 as_pairs(uint2 bytes) {
    return make_uint4(bytes_as_f16(bytes.x, BYTES_01), bytes_as_f16(bytes.x, BYTES_23), bytes_as_f16(bytes.y, BYTES_01),
                      bytes_as_f16(bytes.y, BYTES_23));
}

constexpr int WEIGHT_BYTES = BITS;  // of the 8 weights that a lane has of a row and slice
// 8 weights of a row, the i-th such eight from `unit` on. AS_RAISED: quantized ones are left so, which takes half the instructions.
template <bool AS_RAISED = false>
__device__ __forceinline__ uint4 weights_at(const u8* unit, int i) {
    if (!QUANTIZED) return *(const uint4*)(unit + i * WEIGHT_BYTES);
    uint2 bytes = *(const uint2*)(unit + i * WEIGHT_BYTES);
    if (!AS_RAISED) return as_pairs(bytes);
    return make_uint4(bytes_raised(bytes.x, BYTES_01), bytes_raised(bytes.x, BYTES_23), bytes_raised(bytes.y, BYTES_01),
                      bytes_raised(bytes.y, BYTES_23));
}

// Where the positions of a row and of this block's head begin in the cache, counted in positions; their values'
// `values_after` further on.
template <class Arguments>
__device__ __forceinline__ size_t head_at(const Arguments& a, int layer, int row) {
    return ((size_t)(layer * 2 * a.n_slots + a.rows[row].slot) * H + blockIdx.x / 8) * BLOCK_SIZE;
}
template <class Arguments>
__device__ __forceinline__ size_t values_after(const Arguments& a) {
    return (size_t)a.n_slots * H * BLOCK_SIZE;
}

struct RowState {
    int length, ids[2], n_drawn, running, ended;
};
constexpr int ENDED = 1, HALTED = 2;  // why a row has fewer tokens than it wanted: speech ended; the host wanted the GPU

// Whether the host wants this launch to make no further step: the number of the last that is to halt stands in the host's memory.
__device__ __forceinline__ bool is_halted(const u64* halted, u64 launch) {
    u64 last;
    asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(last) : "l"(halted) : "memory");
    return last >= launch;
}

__device__ __forceinline__ int
thread() {  // volatile: else all that follows from it is kept for the whole loop, in local memory
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
__device__ __forceinline__ int warp() { return thread() / 32; }
__device__ __forceinline__ int lane() {
    int l;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(l));
    return l;
}
// A warp's i-th slice of k: neighbours, so that it reads whole lines of what blocks exchange; if they don't come out even, every
// WARPS-th one, and there may be none.
__device__ __forceinline__ int slice_of(int i) { return EVEN ? warp() * PAIRS + i : warp() + i * WARPS; }
__device__ __forceinline__ void sync() { sync_threads(1, THREADS); }

// ---- arithmetic ----

__device__ __forceinline__ void unpack(float (&v)[8], const uint4& words) {
    v[0] = low_of(words.x), v[1] = high_of(words.x), v[2] = low_of(words.y), v[3] = high_of(words.y);
    v[4] = low_of(words.z), v[5] = high_of(words.z), v[6] = low_of(words.w), v[7] = high_of(words.w);
}

__device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]), pack_pair(v[4], v[5]), pack_pair(v[6], v[7]));
}

__device__ __forceinline__ uint4 as_words(float x, float y, float z, float w) {
    return make_uint4(__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w));
}

// x (1 + erf(x / sqrt 2)) / 2; erf by Abramowitz and Stegun's 7.1.26, which is off by less than 2e-7 and has no branches, as erff has.
__device__ __forceinline__ float gelu(float x) {
    float y = fabsf(x) * 0.70710678f, t = __fdividef(1, fmaf(0.3275911f, y, 1));
    float sum = fmaf(fmaf(fmaf(fmaf(1.061405429f, t, -1.453152027f), t, 1.421413741f), t, -0.284496736f), t, 0.254829592f);
    float tail = sum * t * power_of_2(y * y * -1.44269504f);  // 1 - erf(y)
    return 0.5f * (x + fabsf(x) * (1 - tail));
}

constexpr float SCORE_SCALE = 0.125f * 1.44269504f;  // 1 / sqrt(64), to base 2

// A position's score: 8 dimensions in each of 8 neighbouring lanes
__device__ __forceinline__ float score_of(const float (&q)[8], const float (&k)[8]) {
    float score = 0;
#pragma unroll
    for (int d = 0; d < 8; d++) score = fmaf(q[d], k[d], score);
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) score += __shfl_xor_sync(~0u, score, offset);
    return score * SCORE_SCALE;
}

// Columns column ... + N of x at a row's next position: the embeddings of its ids and of the position.
template <int N>
__device__ __forceinline__ void embedding(float (&x)[N], const u16* table, const float* positions, const RowState& row,
                                          int column) {
    const u16 *first = table + (size_t)row.ids[0] * W + column, *second = table + (size_t)row.ids[1] * W + column;
    const float* position = positions + (size_t)row.length * W + column;
    if constexpr (N == 8) {
        uint4 one = *(const uint4*)first, other = *(const uint4*)second;
        float4 low = *(const float4*)position, high = *(const float4*)(position + 4);
        float p[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        u32 ones[4] = {one.x, one.y, one.z, one.w}, others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            x[i] = low_bf16(ones[i / 2]) + low_bf16(others[i / 2]) + p[i];
            x[i + 1] = high_bf16(ones[i / 2]) + high_bf16(others[i / 2]) + p[i + 1];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            u32 one = *(const u32*)(first + i), other = *(const u32*)(second + i);
            float2 p = *(const float2*)(position + i);
            x[i] = low_bf16(one) + low_bf16(other) + p.x, x[i + 1] = high_bf16(one) + high_bf16(other) + p.y;
        }
    }
}
