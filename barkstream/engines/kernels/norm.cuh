// Layer norm without weights, those being folded into the matrices behind it: a block of THREADS a row of W.
#pragma once
#include "ptx.cuh"

constexpr int W = WIDTH, THREADS = 256, PER_THREAD = (W + THREADS - 1) / THREADS, WARPS = THREADS / 32;

__device__ __forceinline__ float sum_of_block(float x, float* scratch) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += scratch[i];
    return total;
}

// x [W] of the block's row -> its norm, bf16
__device__ __forceinline__ void write_normed(u16* normed, const float (&x)[PER_THREAD]) {
    __shared__ float scratch[WARPS];
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
        if (threadIdx.x + i * THREADS < W) sum += x[i];
    float mean = sum_of_block(sum, scratch) / W;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
        if (threadIdx.x + i * THREADS < W) squares += (x[i] - mean) * (x[i] - mean);
    float scale = rsqrtf(sum_of_block(squares, scratch) / W + 1e-5f);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        int column = threadIdx.x + i * THREADS;
        if (column < W) normed[(size_t)blockIdx.x * W + column] = (u16)pack_bf16((x[i] - mean) * scale, 0);
    }
}

// x [rows][W] -> normed [rows][W], four columns a thread
extern "C" __global__ void __launch_bounds__((W / 4 + 31) / 32 * 32) layer_norm(const float4* x, uint2* normed) {
    constexpr int N_WARPS = (W / 4 + 31) / 32;
    __shared__ float sums[N_WARPS], squares[N_WARPS];
    auto over_block = [](float v, float* scratch) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
        __syncthreads();
        float total = 0;
#pragma unroll
        for (int i = 0; i < N_WARPS; i++) total += scratch[i];
        return total;
    };
    size_t at = (size_t)blockIdx.x * (W / 4) + threadIdx.x;
    bool mine = threadIdx.x < W / 4;
    float4 v = mine ? x[at] : make_float4(0, 0, 0, 0);
    float mean = over_block(v.x + v.y + v.z + v.w, sums) / W;
    if (mine) v.x -= mean, v.y -= mean, v.z -= mean, v.w -= mean;
    float scale = rsqrtf(over_block(v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w, squares) / W + 1e-5f);
    if (mine) normed[at] = make_uint2(pack_bf16(v.x * scale, v.y * scale), pack_bf16(v.z * scale, v.w * scale));
}
