// Drawing a token: noise that is a function of (seed, stage, position), and the likely logits. Twin of
// barkstream/sampling.py.
#pragma once
#include "ptx.cuh"

// One row of a batch on its way through n decode steps. Mirrored in kernels/fused.py.
struct Row {
    u64 seed;
    int slot;      // of the KV cache
    int length;    // positions in the cache, so the index of the position to feed first
    int position;  // of the first token in the generation: the noise's counter
    int ids[2];    // summed at the position to feed first; the first may be -n, see decode.cu
    int n_tokens;  // wanted
    int top_k;     // 0: off
    float temperature, top_p, min_eos_p;
};

constexpr float LARGEST_UNIFORM = 0x1.fffffep-1f;  // the largest float below 1

// NumPy's Philox(key=(seed, stage), counter=(0, position, 0, 0)): block i, counted from 0, is drawn at counter word i
// + 1.
__device__ __forceinline__ void philox(u64 (&words)[4], u64 seed, u64 stage, u64 position, u32 block) {
    u64 c0 = (u64)block + 1, c1 = position, c2 = 0, c3 = 0;
#pragma unroll 1
    for (int round = 0; round < 10; round++) {
        u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
        u64 high1 = __umul64hi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
        c0 = high1 ^ c1 ^ seed, c1 = low1, c2 = high0 ^ c3 ^ stage, c3 = low0;
        seed += 0x9E3779B97F4A7C15ull, stage += 0xBB67AE8584CAA73Bull;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

__device__ __forceinline__ float gumbel(u32 bits) {
    float u = fminf(__double2float_rn(((double)bits + 0.5) * 0x1p-32), LARGEST_UNIFORM);
    return -logf(-log1pf(-u));
}

// Gumbel noise of the 8 vocabulary entries 8 * block ...
__device__ __forceinline__ void gumbel_block(float* to, u64 seed, u64 stage, u64 position, u32 block) {
    u64 words[4];
    philox(words, seed, stage, position, block);
#pragma unroll 1
    for (int i = 0; i < 4; i++) {
        to[2 * i] = gumbel((u32)words[i]);
        to[2 * i + 1] = gumbel((u32)(words[i] >> 32));
    }
}

// What a block of threads knows of some of a row's vocabulary; two of them combine into one.
struct Candidate {
    float value;  // largest of logit / temperature + noise
    int index;
    float peak, sum;  // of the tempered logits: maximum, and sum of exp(logit - peak)
    float end;        // the end token's tempered logit, -inf if it is elsewhere
};

#define NEVER __uint_as_float(0xff800000u)  // -inf

__device__ __forceinline__ Candidate nothing() { return {NEVER, 0x7fffffff, NEVER, 0.f, NEVER}; }

__device__ __forceinline__ Candidate combine(const Candidate& a, const Candidate& b) {
    Candidate c;
    bool first = a.value > b.value || (a.value == b.value && a.index < b.index);
    c.value = first ? a.value : b.value;
    c.index = first ? a.index : b.index;
    c.peak = fmaxf(a.peak, b.peak);
    // nothing() counts as 0 times 1, whose peak may be that of both
    c.sum = a.sum * (a.peak == c.peak ? 1.f : __expf(a.peak - c.peak)) + b.sum * (b.peak == c.peak ? 1.f : __expf(b.peak - c.peak));
    c.end = fmaxf(a.end, b.end);
    return c;
}

// Not inlined, nor unrolled: it runs once a step, and need not push the layers' code out of the instruction cache.
__device__ __noinline__ Candidate combine_warp(Candidate c) {
#pragma unroll 1
    for (int offset = 16; offset; offset /= 2) {
        Candidate other = {__shfl_xor_sync(~0u, c.value, offset), __shfl_xor_sync(~0u, c.index, offset),
                           __shfl_xor_sync(~0u, c.peak, offset), __shfl_xor_sync(~0u, c.sum, offset),
                           __shfl_xor_sync(~0u, c.end, offset)};
        // the lower lane's part stands first, so that every lane adds in one order and gets the same bits
        c = (threadIdx.x & offset) ? combine(other, c) : combine(c, other);
    }
    return c;
}

__device__ __forceinline__ Candidate consider(float logit, float noise, int index, int end, const Row& row) {
    if (row.temperature == 0) return {logit, index, logit, 1.f, NEVER};
    float tempered = logit / row.temperature;
    return {tempered + noise, index, tempered, tempered > NEVER ? 1.f : 0.f, index == end ? tempered : NEVER};
}

// Suno's rule: speech ends when the end token is drawn, or its probability reaches min_eos_p.
__device__ __forceinline__ bool ends(const Candidate& c, int end, const Row& row) {
    if (end < 0) return false;
    if (c.index == end || row.temperature == 0 || row.min_eos_p >= 1) return c.index == end;
    return expf(c.end - c.peak) >= row.min_eos_p * c.sum;
}

// ---- top-p, then top-k: the smallest logit that stays, by bisection over the floats in their order as integers ----
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <int N_WARPS>
__device__ __forceinline__ float sum_of_threads(float x, float* scratch, u32 barrier) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    sync_threads(barrier, N_WARPS * 32);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    sync_threads(barrier, N_WARPS * 32);
    float total = 0;
#pragma unroll
    for (int i = 0; i < N_WARPS; i++) total += scratch[i];
    return total;
}

// logits: this thread's share of the row, padded with -inf. All N_WARPS warps call it; logits whose `ordered` reaches
// the result stay.
template <int N_WARPS, int N>
__device__ __noinline__ u32 smallest_kept(const float (&logits)[N], const Row& row, float* scratch, u32 barrier) {
    u32 least = 0;  // keys >= least stay
    if (row.top_p < 1) {
        float total = 0, powers[N];  // logits are far below exp's overflow after the shift by their own maximum
        float peak = NEVER;
        for (int i = 0; i < N; i++) peak = fmaxf(peak, logits[i]);
        for (int offset = 16; offset; offset /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, offset));
        sync_threads(barrier, N_WARPS * 32);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = peak;
        sync_threads(barrier, N_WARPS * 32);
        for (int i = 0; i < N_WARPS; i++) peak = fmaxf(peak, scratch[i]);
        for (int i = 0; i < N; i++) powers[i] = expf(logits[i] - peak), total += powers[i];
        float most = row.top_p * sum_of_threads<N_WARPS>(total, scratch, barrier);
#pragma unroll 1
        for (u32 bit = 0x80000000u; bit; bit /= 2) {  // the smallest key above which no more than top_p lies
            float above = 0;
            for (int i = 0; i < N; i++) above += ordered(logits[i]) > (least | (bit - 1)) ? powers[i] : 0.f;
            if (sum_of_threads<N_WARPS>(above, scratch, barrier) > most) least |= bit;
        }
    }
    if (row.top_k > 0) {
        u32 kth = 0;
#pragma unroll 1
        for (u32 bit = 0x80000000u; bit; bit /= 2) {  // the largest key that at least top_k reach
            float n = 0;
            for (int i = 0; i < N; i++) n += ordered(logits[i]) >= (kth | bit) ? 1.f : 0.f;
            if (sum_of_threads<N_WARPS>(n, scratch, barrier) >= row.top_k) kth |= bit;
        }
        if (kth > least) least = kth;
    }
    return least;
}
