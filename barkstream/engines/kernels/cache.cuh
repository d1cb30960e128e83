// Where keys and values lie in the KV cache: [layers][keys, values][slots][H][BLOCK_SIZE][64], bf16; or bytes, with a scale for
// each 64 of them: [layers][keys, values][slots][H][BLOCK_SIZE], fp32.
//
// A position's 64 lie in pieces of 16 bytes, which are shuffled so that 8 positions' same piece comes from different banks once the
// positions are copied into shared memory (wide.cu).
#pragma once
#include "ptx.cuh"

constexpr bool BYTES_CACHED = CACHE_BITS == 8;
constexpr int CACHED = BYTES_CACHED ? 64 : 128;  // bytes of a position's keys, or values, of a head

__device__ __forceinline__ int cached_piece(int position, int piece) {
    return BYTES_CACHED ? piece ^ (position >> 1 & 3) : piece ^ (position & 7);
}
// Bytes from a head's first position to dimensions 8 * eight ... of this one.
__device__ __forceinline__ int cached_at(int position, int eight) {
    if (BYTES_CACHED) return position * CACHED + cached_piece(position, eight / 2) * 16 + eight % 2 * 8;
    return position * CACHED + cached_piece(position, eight) * 16;
}

// The largest of v over 8 neighbouring lanes, as the scale that makes it 127. All lanes call it.
__device__ __forceinline__ float scale_of_eights(const float (&v)[8]) {
    float most = 1e-20f;
#pragma unroll
    for (int d = 0; d < 8; d++) most = fmaxf(most, fabsf(v[d]));
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    return most / 127;
}
__device__ __forceinline__ uint2 as_bytes(const float (&v)[8], float scale) {
    float by = 1 / scale;
    return make_uint2(pack_bytes(v[0] * by, v[1] * by, v[2] * by, v[3] * by),
                      pack_bytes(v[4] * by, v[5] * by, v[6] * by, v[7] * by));
}
