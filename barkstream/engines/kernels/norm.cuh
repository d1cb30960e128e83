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

// x [n_rows][W] -> normed [n_rows][W]; a warp a row, four columns a lane at a time
constexpr int NORM_ROWS = 2;  // of a block
extern "C" __global__ void __launch_bounds__(NORM_ROWS * 32) layer_norm(const float4* x, uint2* normed, int n_rows) {
    constexpr int PER_LANE = (W / 4 + 31) / 32;
    int row = blockIdx.x * NORM_ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= n_rows) return;
    auto over_warp = [](float sum) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
        return sum;
    };
    float4 v[PER_LANE];
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int four = lane + i * 32;
        v[i] = four < W / 4 ? x[(size_t)row * (W / 4) + four] : make_float4(0, 0, 0, 0);
        sum += v[i].x + v[i].y + v[i].z + v[i].w;
    }
    float mean = over_warp(sum) / W;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        if (lane + i * 32 < W / 4) v[i].x -= mean, v[i].y -= mean, v[i].z -= mean, v[i].w -= mean;
        squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    }
    float scale = rsqrtf(over_warp(squares) / W + 1e-5f);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        int four = lane + i * 32;
        if (four < W / 4)
            normed[(size_t)row * (W / 4) + four] =
                make_uint2(pack_bf16(v[i].x * scale, v[i].y * scale), pack_bf16(v[i].z * scale, v[i].w * scale));
    }
}
