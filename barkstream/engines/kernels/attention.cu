// Attention over all tokens of prefixes (CAUSAL, whose keys and values also go into the cache) or of windows: a block takes 64 queries
// of a head and goes through the keys 64 at a time (flash attention, tensor cores). Of a GROUP of four warps each takes 16 queries; with
// two groups, each takes every other 64 keys: for few rows, where the longest block is what is waited for.
#if CAUSAL
#include "cache.cuh"
#else
#include "ptx.cuh"
#endif

constexpr int W = WIDTH, H = W / 64, TILE = 64, TILE_BYTES = TILE * 128, GROUP = 128, THREADS = GROUP * GROUPS;
constexpr float SCALE = 0.125f * 1.44269504f;  // 1 / sqrt(64), for powers of two

// Bytes from a tile's beginning to 8 dimensions of one of its tokens, shuffled so that 8 tokens' same dimensions lie in different banks.
__device__ __forceinline__ int tile_at(int token, int eight) { return token * 128 + (eight ^ (token & 7)) * 16; }

__device__ __forceinline__ void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// By a group. from: the first token's 64 dimensions; the next token's are 3 W further
__device__ __forceinline__ void fetch(u8* tile, const u16* from) {
#pragma unroll
    for (int i = threadIdx.x % GROUP; i < TILE * 8; i += GROUP)
        copy_16(shared_address(tile) + tile_at(i / 8, i % 8), from + (size_t)(i / 8) * 3 * W + i % 8 * 8);
}

#if CAUSAL
// A tile's keys, or values, into the cache of a slot's head, to the bit as `store` of batched.cu has them there.
__device__ __forceinline__ void keep(const u8* tile, u8* cache, float* scales, size_t head, int first) {
#pragma unroll
    for (int i = threadIdx.x; i < TILE * 8; i += THREADS) {
        int token = i / 8, eight = i % 8, position = first + token;
        uint4 words = *(const uint4*)(tile + tile_at(token, eight));
        u8* to = cache + head * BLOCK_SIZE * CACHED + cached_at(position, eight);
        if (!BYTES_CACHED) {
            *(uint4*)to = words;
            continue;
        }
        float v[8] = {low_bf16(words.x), high_bf16(words.x), low_bf16(words.y), high_bf16(words.y),
                      low_bf16(words.z), high_bf16(words.z), low_bf16(words.w), high_bf16(words.w)};
        float most = 1e-20f;
#pragma unroll
        for (int d = 0; d < 8; d++) most = fmaxf(most, fabsf(v[d]));
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
        float by = 127 / most;
        *(uint2*)to = make_uint2(pack_bytes(v[0] * by, v[1] * by, v[2] * by, v[3] * by),
                                 pack_bytes(v[4] * by, v[5] * by, v[6] * by, v[7] * by));
        if (eight == 0) scales[head * BLOCK_SIZE + position] = most / 127;
    }
}
#endif

// grid: heads, n_tokens / 64, rows. qkv [rows][n_tokens][3 W] -> out [rows][n_tokens][W], bf16. Shared memory: 1 + 4 GROUPS tiles.
extern "C" __global__ void __launch_bounds__(THREADS, 4 / GROUPS)
    attend_all(const u16* qkv, u16* out, int n_tokens
#if CAUSAL
               ,
               const int* slots, u8* cache, float* scales, int n_slots, int layer
#endif
    ) {
    extern __shared__ __align__(128) u8 shared[];  // the queries, and of each group two tiles of keys and two of values
    int group = threadIdx.x / GROUP, warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, g = lane / 4, pair = lane % 4 * 2;
    int head = blockIdx.x, tile = gridDim.y - 1 - blockIdx.y, n_tiles = CAUSAL ? tile + 1 : gridDim.y;  // the longest first
    u8* tiles = shared + TILE_BYTES;
    auto keys_of = [&](int t) { return tiles + (t % GROUPS * 4 + t / GROUPS % 2 * 2) * TILE_BYTES; };
    const u16* q = qkv + (size_t)blockIdx.z * n_tokens * 3 * W + head * 64;
    auto fetch_tile = [&](int t) {
        fetch(keys_of(t), q + W + (size_t)t * TILE * 3 * W);
        fetch(keys_of(t) + TILE_BYTES, q + 2 * W + (size_t)t * TILE * 3 * W);
    };
    if (group == 0) fetch(shared, q + (size_t)tile * TILE * 3 * W);
    if (group < n_tiles) fetch_tile(group);
    float o[8][4] = {}, highest[2] = {-1e30f, -1e30f}, sum[2] = {};
    for (int first = 0; first < n_tiles; first += GROUPS) {
        int t = first + group;
        wait_for_copies();
        __syncthreads();
        if (t + GROUPS < n_tiles) fetch_tile(t + GROUPS);
        if (t >= n_tiles) break;  // the last time: no barrier of the loop follows
        float s[8][4] = {};
#pragma unroll
        for (int k = 0; k < 4; k++) {  // 16 dimensions; the queries again each time, for they would take 16 registers
            u32 a[4];
            load_matrices(a, shared_address(shared) + tile_at(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 b[4];
                load_matrices(b, shared_address(keys_of(t)) +
                                     tile_at(n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                multiply_add(s[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                multiply_add(s[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        if (CAUSAL && t == tile)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (n * 8 + pair + i % 2 > warp * 16 + g + i / 2 * 8) s[n][i] = -1e30f;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // rows g and g + 8 of the warp's 16
            float most = highest[half];
#pragma unroll
            for (int n = 0; n < 8; n++) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            float rescale = power_of_2((highest[half] - most) * SCALE), raised = most * SCALE;
            highest[half] = most, sum[half] *= rescale;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                o[n][2 * half] *= rescale, o[n][2 * half + 1] *= rescale;
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[n][i] = power_of_2(fmaf(s[n][i], SCALE, -raised));
                    sum[half] += s[n][i];
                }
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {  // 16 keys
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = pack_bf16(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 b[4];
                load_transposed(b, shared_address(keys_of(t)) + TILE_BYTES +
                                       tile_at(k * 16 + lane % 16, 2 * n + lane / 16));
                multiply_add(o[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                multiply_add(o[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }
#if CAUSAL
    size_t kept = ((size_t)layer * 2 * n_slots + slots[blockIdx.z]) * H + head;
    keep(keys_of(tile), cache, scales, kept, tile * TILE);
    keep(keys_of(tile) + TILE_BYTES, cache, scales, kept + (size_t)n_slots * H, tile * TILE);
#endif
    if (GROUPS > 1) {  // the second group's sums to the first
        __syncthreads();
        float* parts = (float*)tiles;
        auto part = [&](int i) -> float& { return parts[i * GROUP + threadIdx.x % GROUP]; };
        if (group == 1) {
#pragma unroll
            for (int i = 0; i < 32; i++) part(i) = o[i / 4][i % 4];
#pragma unroll
            for (int half = 0; half < 2; half++) part(32 + half) = highest[half], part(34 + half) = sum[half];
        }
        __syncthreads();
        if (group == 1) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = fmaxf(highest[half], part(32 + half));
            float by = power_of_2((highest[half] - most) * SCALE), others = power_of_2((part(32 + half) - most) * SCALE);
            sum[half] = sum[half] * by + part(34 + half) * others;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) o[n][i] = o[n][i] * by + part(4 * n + i) * others;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        float by = 1 / total;
        size_t token = (size_t)blockIdx.z * n_tokens + tile * TILE + warp * 16 + g + half * 8;
#pragma unroll
        for (int n = 0; n < 8; n++)
            *(u32*)(out + token * W + head * 64 + n * 8 + pair) =
                pack_bf16(o[n][2 * half] * by, o[n][2 * half + 1] * by);
    }
}
