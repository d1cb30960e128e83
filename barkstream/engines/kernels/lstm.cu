// Two layers of an LSTM, all steps of 1 to 8 rows in one launch, float32: 128 blocks, one a multiprocessor, that run at once. cuDNN
// launches several kernels a step, though a step is no more than two small products.
//
// - Weights are read once and stay in registers, 96 a thread. A block has 4 units of both layers: 16 gates each, of which layer 0's take
//   W products and layer 1's 2 W. What layer 0 gets from its inputs depends on no earlier step: cuBLAS has computed it for all.
// - Layers run side by side. In tick t layer 0 is at step t and layer 1 at step t - 1: what both need, h of layer 0 at step t - 1 and of
//   layer 1 at step t - 2, is known from the tick before. So n steps are n + 1 ticks, and a tick has one exchange between blocks.
// - Blocks exchange h as packets (packets.cuh), 4 units of a layer and row each. In the first tick layer 1 has nothing to do, and
//   publishes what it starts with; in the last one layer 0 has nothing to do, and nobody publishes.
// - Two buffers, of even and of odd ticks, are enough. A block publishes in tick t after all of its threads have read all packets of tick
//   t - 1, and in tick t + 1 after it has read those that all blocks published in tick t. So when a packet of tick t + 1 replaces one of
//   tick t - 1, everybody has read that; and who waits for one of tick t finds it, or the one of tick t - 2, and no other. One bit tells
//   these apart. Before a launch the packets must be zero, which is not the mark of either buffer's first tick.
// - The mark takes the lowest bit of every fourth h. It is cleared in whatever is multiplied, also in what a launch starts with: so it
//   makes no difference where a sequence is cut into launches.
#include "packets.cuh"

constexpr int W = WIDTH, B = N_ROWS, LAYERS = 2, GATES = 4, MATRICES = 3;
constexpr int UNITS = 4, BLOCKS = W / UNITS, CELLS = UNITS * LAYERS * B;  // a block's units, and what it computes each tick
constexpr int HALVES = 2, EACH = W / HALVES / 128;  // warps that share a unit's products; fours of a half that a lane takes
constexpr int THREADS = LAYERS * BLOCKS;            // one for each packet of a row
constexpr int COPIES = 4;                           // of every packet: 128 readers of a line of L2 would wait for each other
constexpr bool PROBES = B > 2;                      // one row first: looking at all in vain would hold up what is looked for
constexpr int POLL_DELAY = 400;  // cycles from a tick's sums to the first look for what others make of theirs; 0 to 1,300 are alike
static_assert(THREADS == UNITS * HALVES * 32 && EACH * HALVES * 128 == W && B <= 8);

struct Arguments {
    const float* weights;  // [MATRICES][W units][GATES][W]: of h of layer 0 for layer 0, and for layer 1; of h of layer 1
    const float* bias;     // [W][GATES] of layer 1
    const float* given;    // [n_steps][rows_a_step][W][GATES]: products of layer 0's inputs, its biases included
    const float *h, *c;    // [n_rows][LAYERS][W] at the start, rows h_stride and c_stride apart
    float* y;              // [n_steps][rows_a_step][W]
    float *last_h, *last_c;  // [n_rows][LAYERS][W] at the end
    u8* packets;             // [2][COPIES][B][LAYERS][BLOCKS], zero
    int n_steps, n_rows, rows_a_step, h_stride, c_stride;
};

struct Shared {
    float4 h[B][LAYERS][BLOCKS];  // of the tick before
    float4 sums[B][HALVES][LAYERS][UNITS];
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int half() { return threadIdx.x / 32 % HALVES; }
__device__ __forceinline__ int unit_of_warp() { return threadIdx.x / 32 / HALVES; }

// ---- what blocks tell one another ----

__device__ __forceinline__ u8* packets_at(const Arguments& a, int t, int copy, int row) {
    return a.packets + ((t % 2 * COPIES + copy) * B + row) * (LAYERS * BLOCKS * 16);
}
__device__ __forceinline__ u32 mark_of(int t) { return t / 2 % 2 ^ 1; }
__device__ __forceinline__ float4 unmarked(const uint4& v) {
    return make_float4(__uint_as_float(v.x & ~1u), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// Every block's h of tick t.
__device__ __forceinline__ void receive(Shared& shared, const Arguments& a, int t) {
    const u8* from = packets_at(a, t, blockIdx.x % COPIES, 0) + threadIdx.x * 16;
    auto address = [&](int row) { return from + row * (LAYERS * BLOCKS * 16); };
    auto wanted = [&](const uint4& packet) { return (packet.x & 1) == mark_of(t); };
    uint4 packets[B], last[1];
    if (PROBES) await(last, [&](int) { return address(B - 1); }, wanted);
    await(packets, address, wanted);
    __syncwarp();
#pragma unroll
    for (int row = 0; row < B; row++) (&shared.h[row][0][0])[threadIdx.x] = unmarked(packets[row]);
}

// The h that the launch starts with; zeros in rows that are not there.
__device__ __forceinline__ void receive_carried(Shared& shared, const Arguments& a) {
#pragma unroll
    for (int row = 0; row < B; row++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        const u32* from = (const u32*)a.h + (size_t)row * a.h_stride + threadIdx.x * UNITS;
        if (row < a.n_rows) v = make_uint4(from[0], from[1], from[2], from[3]);
        (&shared.h[row][0][0])[threadIdx.x] = unmarked(v);
    }
}

// ---- products ----

// A lane's share of its unit's weights. Its j-th gate is j ^ lane / 8, see `folded`.
__device__ __forceinline__ void load_weights(float4 (&weights)[MATRICES][GATES][EACH], const Arguments& a) {
#pragma unroll
    for (int matrix = 0; matrix < MATRICES; matrix++)
#pragma unroll
        for (int j = 0; j < GATES; j++)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int unit = blockIdx.x * UNITS + unit_of_warp(), gate = j ^ lane() / 8;
                const float* row = a.weights + ((size_t)(matrix * W + unit) * GATES + gate) * W;
                weights[matrix][j][i] = ((const float4*)row)[(half() * EACH + i) * 32 + lane()];
            }
}

__device__ __forceinline__ void add_product(float& sum, const float4& x, const float4& y) {
    sum = fmaf(x.x, y.x, sum), sum = fmaf(x.y, y.y, sum), sum = fmaf(x.z, y.z, sum), sum = fmaf(x.w, y.w, sum);
}

// The warp's sum for gate lane / 8 of layer lane / 4 % 2. That lanes number their gates differently makes what one keeps, and what it
// gives away, the same places for all: no selects.
__device__ __forceinline__ float folded(float (&sums)[LAYERS][GATES]) {
#pragma unroll
    for (int layer = 0; layer < LAYERS; layer++) {
        float* of = sums[layer];
        of[0] += __shfl_xor_sync(~0u, of[1], 8), of[2] += __shfl_xor_sync(~0u, of[3], 8);
        of[0] += __shfl_xor_sync(~0u, of[2], 16);
    }
    bool second = lane() / 4 % 2;
    float sum = second ? sums[1][0] : sums[0][0];
    sum += __shfl_xor_sync(~0u, second ? sums[0][0] : sums[1][0], 4);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return sum + __shfl_xor_sync(~0u, sum, 1);
}

__device__ __forceinline__ void multiply(Shared& shared, const float4 (&weights)[MATRICES][GATES][EACH]) {
#pragma unroll 2
    for (int row = 0; row < B; row++) {
        float sums[LAYERS][GATES] = {};
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int four = (half() * EACH + i) * 32 + lane();
            float4 first = shared.h[row][0][four], second = shared.h[row][1][four];
#pragma unroll
            for (int j = 0; j < GATES; j++) {
                add_product(sums[0][j], weights[0][j][i], first);
                add_product(sums[1][j], weights[1][j][i], first), add_product(sums[1][j], weights[2][j][i], second);
            }
        }
        float sum = folded(sums);
        if (lane() % 4 == 0) ((float*)&shared.sums[row][half()][lane() / 4 % 2][unit_of_warp()])[lane() / 8] = sum;
    }
}

// ---- cells: a unit of a layer and row, whose state one thread keeps ----

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1, 1 + expf(-x)); }

struct Cell {
    int unit, layer, row, column;
    bool there;    // the row is
    float h, c;
    float4 given;  // to the gates' sums: layer 1's biases, or what layer 0 got for the next step

    __device__ __forceinline__ Cell(const Arguments& a) {
        unit = threadIdx.x % UNITS, layer = threadIdx.x / UNITS % LAYERS, row = threadIdx.x / (UNITS * LAYERS);
        column = blockIdx.x * UNITS + unit, there = row < a.n_rows;
        h = there ? a.h[(size_t)row * a.h_stride + layer * W + column] : 0;
        c = there ? a.c[(size_t)row * a.c_stride + layer * W + column] : 0;
        given = there ? ((const float4*)a.bias)[column] : make_float4(0, 0, 0, 0);
        fetch(a, 0);
    }

    // What layer 0 got for step t: early, for it takes long, and nothing waits for it before `advance`.
    __device__ __forceinline__ void fetch(const Arguments& a, int t) {
        const float* from = a.given + (((size_t)t * a.rows_a_step + row) * W + column) * GATES;
        load_cached_l2(given, from, layer == 0 && there && t < a.n_steps);
    }

    // Tick t, if the layer has a step in it.
    __device__ __forceinline__ void advance(const Shared& shared, const Arguments& a, int t) {
        if (layer ? t == 0 : t == a.n_steps) return;
        float4 one = shared.sums[row][0][layer][unit], other = shared.sums[row][1][layer][unit];
        float in = sigmoid(given.x + (one.x + other.x)), forget = sigmoid(given.y + (one.y + other.y));
        float news = tanhf(given.z + (one.z + other.z)), out = sigmoid(given.w + (one.w + other.w));
        c = fmaf(forget, c, in * news);
        h = out * tanhf(c);
    }

    // Each of the four lanes that have a packet's values writes a copy of it.
    __device__ __forceinline__ void tell(const Arguments& a, int t) const {
        static_assert(COPIES == UNITS);
        constexpr u32 LANES = CELLS < 32 ? (1u << CELLS % 32) - 1 : ~0u;
        u32 word = __float_as_uint(h);
        uint4 packet =
            make_uint4(__shfl_sync(LANES, word, 0, UNITS), __shfl_sync(LANES, word, 1, UNITS),
                       __shfl_sync(LANES, word, 2, UNITS), __shfl_sync(LANES, word, 3, UNITS));
        publish(packets_at(a, t, unit, row) + (layer * BLOCKS + blockIdx.x) * 16, packet, mark_of(t));
    }

    __device__ __forceinline__ void write_output(const Arguments& a, int t) const {
        if (layer == 1 && there && t > 0) a.y[((size_t)(t - 1) * a.rows_a_step + row) * W + column] = h;
    }
    __device__ __forceinline__ void write_last(const Arguments& a) const {
        size_t at = (size_t)(row * LAYERS + layer) * W + column;
        if (there) a.last_h[at] = h, a.last_c[at] = c;
    }
};

// More than 128 registers a thread: no two blocks share a multiprocessor.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lstm(const __grid_constant__ Arguments a) {
    __shared__ Shared shared;
    float4 weights[MATRICES][GATES][EACH];
    load_weights(weights, a);
    bool has_cell = threadIdx.x < CELLS;
    Cell cell(a);  // of the other threads: never used
    receive_carried(shared, a);
    for (int t = 0;; t++) {
        __syncthreads();
        multiply(shared, weights);
        __syncthreads();
        u32 start = clock_cycles();
        if (has_cell) {
            cell.advance(shared, a, t);
            if (t < a.n_steps) cell.tell(a, t);
            cell.write_output(a, t);
        }
        if (t == a.n_steps) break;
        if (has_cell) cell.fetch(a, t + 1);
        while (clock_cycles() - start < POLL_DELAY);
        receive(shared, a, t);
    }
    if (has_cell) cell.write_last(a);
}
