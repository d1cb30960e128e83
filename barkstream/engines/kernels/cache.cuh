// Where keys and values lie in the KV cache: [layers][keys, values][slots][H][BLOCK_SIZE][64], bf16.
#pragma once

// Which 8 of a position's 64 places hold its dimensions 8 * eight ...: shuffled, so that the same dimensions of 8 positions in a
// row come from different banks once the positions are copied into shared memory (wide.cu).
__device__ __forceinline__ int cached_eight(int position, int eight) { return eight ^ (position & 7); }
