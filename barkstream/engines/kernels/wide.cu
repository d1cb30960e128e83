// n decode steps of a causal GPT for 8 to 64 rows in one launch: one block per multiprocessor, all of them working on
// every matrix, and all memory traffic in one stream. docs/performance.md has the measurements behind each choice.
//
// - All that a step reads from memory, weights as well as keys and values, passes through a ring of stages in shared
//   memory, in the order of use. One warp copies, as far ahead as the ring goes: while blocks wait for one another the
//   next matrices, or the next layer's keys, arrive.
// - Each block owns 8 columns of x, 24 of q | k | v (those of head block / 8), 32 of the MLP's hidden layer, and the attention of an
//   eighth of the rows for its head. The MLP's second product is split over k besides, because every block reading
//   all of the hidden layer would take longer than the weights: 4 blocks make 32 columns together, each from a quarter of k,
//   and exchange sums.
// - Activations lie in global memory (so in L2), row after row, and are loaded straight into the tensor cores' right
//   operand; weights are the left one. Products are split over k by warp.
// - A block that has done its part of a phase publishes the phase's number; a warp waits for those blocks only whose columns
//   it multiplies. There are 5 phases in a layer: q | k | v, attention, its projection, the MLP's hidden layer, its output.
//   No buffer is needed twice: whoever writes it has waited for blocks that waited for all of its readers.
// - Layer norm: as in decode.cu.
#include "decode.cuh"

constexpr int POSITIONS = UNIT / 256;                    // whose keys and values fill a stage
constexpr int TOGETHER = B < 32 ? B : 32, N = TOGETHER / 8;  // rows multiplied at once, and the tensor cores' groups of 8
constexpr int SHARE = B / 8;                             // rows whose attention a block computes
constexpr int STRIDE = B == 8 ? 8 : B + 8;               // of a column of partial sums: no two banks alike
constexpr int PADDED = BLOCKS * HEAD_UNITS * 8;          // logits of a row
constexpr int HEAD_GROUP = HEAD_UNITS % 4 == 0 ? 4 : 2;  // units of the head that are multiplied together
constexpr int COPIES = 4;                                // of the numbers that everybody polls

struct Arguments {
    const u8* weights;       // [BLOCKS][ALL_UNITS][UNIT]
    const u16* embedding;    // [ids][W], bf16
    const float* positions;  // [BLOCK_SIZE][W]
    u16* cache;              // [N_LAYERS][2][slots][H][BLOCK_SIZE][64], bf16
    u16 *x, *middle;         // [B][W]: the input of attention, and of the MLP
    u16 *query, *attended;   // [B][W]
    u16* hidden;             // [B][4 W]
    float *logits, *noise;   // [B][PADDED]
    u32* published;          // [COPIES][BLOCKS]: phases; this and the next two are zero at the start
    u8* exchange;            // [BLOCKS][4 sources][2 halves][B] packets: partial sums of the MLP's output
    u8* drawn;               // [B] packets: token, whether it ended, -, step + 1
    int* tokens;             // [B][BLOCK_SIZE]: vocabulary indices within the book
    int* result;             // [B][2]: how many tokens, and whether speech ended
    int n_slots, n_steps;
    int one_book;  // all rows stand at the same codebook, so the others need not be computed
    u8 order[B];   // [8 ranks][SHARE]: rows dealt to a head's blocks
    Row rows[B];
};

struct Shared {
    u64 full[STAGES], empty[STAGES];
    __align__(16) uint4 newest[SHARE][3][8];  // query, key and value of the positions being fed
    float2 moments[WARPS][B];                 // of a warp's slices of x: sum, and sum of squares
    float residual[8][B];                     // this block's columns of x, in full precision
    float2 part_scale[SHARE][WARPS];          // attention of a warp's positions: peak and sum
    Candidate candidates[WARPS];
    float scratch[WARPS];
    RowState rows[B];
    int stop;
};

__device__ __forceinline__ int row_of(const Arguments& a, int i) { return a.order[blockIdx.x % 8 * SHARE + i]; }
__device__ __forceinline__ int book_of(const Arguments& a, int row, int step) {
    return (a.rows[row].position + step) % N_BOOKS;
}
__device__ __forceinline__ u16* keys_at(const Arguments& a, int layer, int row) {
    return a.cache + ((size_t)(layer * 2 * a.n_slots + a.rows[row].slot) * H + blockIdx.x / 8) * BLOCK_SIZE * 64;
}
__device__ __forceinline__ size_t values_after(const Arguments& a) { return (size_t)a.n_slots * H * BLOCK_SIZE * 64; }

// ---- the copying warp, of which one lane works ----

struct Copier {
    const Arguments& a;
    Shared& shared;
    u8* stages;
    u32 n;  // stages filled so far

    __device__ void land(u32 i) { barrier_wait(&shared.full[i % STAGES], i / STAGES & 1); }
    // The next stage, when it is free. Never more than IN_FLIGHT are on their way: what others poll waits behind them.
    __device__ u64* next(u32 bytes) {
        barrier_wait(&shared.empty[n % STAGES], (n / STAGES & 1) ^ 1);
        if (n >= IN_FLIGHT) land(n - IN_FLIGHT);
        u64* full = &shared.full[n % STAGES];
        barrier_expect(full, bytes);
        return full;
    }
    __device__ void units(int block, int first, int count) {
        for (int i = 0; i < count; i++, n++) {
            u64* full = next(UNIT);
            copy_to_shared(stages + n % STAGES * UNIT, a.weights + ((size_t)block * ALL_UNITS + first + i) * UNIT, UNIT,
                           full);
        }
    }
    __device__ void keys_and_values(int layer) {
        for (int i = 0; i < SHARE; i++) {
            int row = row_of(a, i), length = shared.rows[row].running ? shared.rows[row].length : 0;
            const u16* keys = keys_at(a, layer, row);
            for (int first = 0; first < length; first += POSITIONS, n++) {
                int bytes = min(POSITIONS, length - first) * 128;
                u64* full = next(2 * bytes);
                u8* stage = stages + n % STAGES * UNIT;
                copy_to_shared(stage, keys + first * 64, bytes, full);
                copy_to_shared(stage + UNIT / 2, keys + values_after(a) + first * 64, bytes, full);
            }
        }
    }
};

__device__ void copying_warp(const Arguments& a, Shared& shared, u8* stages) {
    Copier copier = {a, shared, stages, 0};
    int block = blockIdx.x;
    for (int step = 0; step < a.n_steps; step++) {
        for (int layer = 0; layer < N_LAYERS; layer++) {
            int first = layer * LAYER_UNITS;
            if (lane() == 0) copier.units(block, first, OUT_UNIT);
            if (layer == 0) {  // the rows' new states, and the keys that others wrote in the step before
                if (step) sync_threads(3, THREADS + 64);
                if (shared.stop) break;
                asm volatile("fence.proxy.async;" ::: "memory");
            }
            if (lane() == 0) {
                copier.keys_and_values(layer);
                copier.units(block, first + OUT_UNIT, DOWN_UNIT - OUT_UNIT);
                for (int i = 0; i < 4; i++)  // a piece of k, of the rows of 4 blocks
                    copier.units(block / 4 * 4 + i, first + DOWN_UNIT + block % 4, 1);
            }
        }
        if (shared.stop) break;
        for (int book = 0; book < N_BOOKS; book++)
            if (lane() == 0 && (!a.one_book || book == book_of(a, 0, step)))
                copier.units(block, N_LAYERS * LAYER_UNITS + book * HEAD_UNITS, HEAD_UNITS);
    }
    if (lane() == 0)  // also what nobody will use must land before the block ends
        for (u32 i = copier.n < STAGES ? 0 : copier.n - STAGES; i < copier.n; i++) copier.land(i);
}

// ---- the 8 computing warps ----

// What a warp carries from phase to phase.
struct Place {
    Shared& shared;
    const u8* stages;
    float* partial;  // [WARPS][4 units][8 columns][STRIDE]
    u32 n_taken;     // stages
    u32 phase;       // the one that this block has published last
};

// Stages are taken in the order in which they were filled; i: how many after the next one.
__device__ __forceinline__ const u8* stage_at(const Place& place, int i) {
    return place.stages + (place.n_taken + i) % STAGES * UNIT;
}
__device__ __forceinline__ void wait_for_stage(const Place& place, int i) {
    u32 n = place.n_taken + i;
    barrier_wait(&place.shared.full[n % STAGES], n / STAGES & 1);
}
__device__ __forceinline__ void release_stages(Place& place, int n) {
    __syncwarp();
    if (lane() == 0)
        for (int i = 0; i < n; i++) barrier_arrive(&place.shared.empty[(place.n_taken + i) % STAGES]);
    place.n_taken += n;
}

// This block has written all that belongs to a phase.
__device__ __forceinline__ void publish_phase(const Arguments& a, Place& place) {
    place.phase++;
    sync();
    if (warp() == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        if (lane() < COPIES)
            asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(a.published + lane() * BLOCKS + blockIdx.x),
                         "r"(place.phase)
                         : "memory");
    }
}

// Each lane of a warp waits until a block has published the phase that this one has published last; block < 0: for none.
__device__ __forceinline__ void await_blocks(const Arguments& a, const Place& place, int block) {
    const u32* published = a.published + blockIdx.x % COPIES * BLOCKS + max(block, 0);
    u32 seen, patience = PATIENCE;
    do {
        asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(published) : "memory");
        if (--patience == 0) __trap();
    } while (block >= 0 && seen < place.phase);
    __syncwarp();
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// The block that made columns of this warp's i-th slice, the j-th of PER_SLICE such blocks, for the lane that waits for it: -1
// for the other lanes. In attention 8 blocks make a head's 2 slices, so `SLICES_EACH` is 2.
template <int PER_SLICE, int SLICES_EACH = 1>
__device__ __forceinline__ int maker_of_slice() {
    int slice = warp() + lane() / PER_SLICE * WARPS;
    return slice < SLICES ? slice / SLICES_EACH * PER_SLICE + lane() % PER_SLICE : -1;
}

// sums of N_UNITS units over this warp's slices of k, for all rows, into `partial`; the moments of x beside them.
// x: [B][stride], of which W columns are multiplied. act: what is loaded of x; `loaded`: as the last call left it.
template <int N_UNITS, bool MOMENTS>
__device__ __forceinline__ void multiply(Place& place, uint4 (&act)[N][PAIRS], const u16* x, int stride, bool loaded) {
    constexpr int TILES = (N_UNITS + 1) / 2;
    constexpr u32 ONES = 0x3f803f80u;
#pragma unroll 1
    for (int first = 0; first < B; first += TOGETHER) {
        if (!loaded || B > TOGETHER) {
            const u16* mine = x + (size_t)(first + lane() / 4) * stride + warp() * 32 + lane() % 4 * 8;
#pragma unroll
            for (int i = 0; i < PAIRS; i++)
#pragma unroll
                for (int n = 0; n < N; n++) {
                    act[n][i] = make_uint4(0, 0, 0, 0);
                    if (SLICES % WARPS == 0 || warp() + i * WARPS < SLICES)
                        act[n][i] = load_cached_l2(mine + n * 8 * stride + i * WARPS * 32);
                }
        }
        if (first == 0)
#pragma unroll
            for (int i = 0; i < N_UNITS; i++) wait_for_stage(place, i);
        float sums[TILES][N][4] = {}, moments[N][4] = {};
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            if (SLICES % WARPS && warp() + i * WARPS >= SLICES) break;
            int at = ((warp() + i * WARPS) * 32 + lane()) * 16;
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                uint4 upper = *(const uint4*)(stage_at(place, 2 * t) + at), lower = make_uint4(0, 0, 0, 0);
                if (2 * t + 1 < N_UNITS) lower = *(const uint4*)(stage_at(place, 2 * t + 1) + at);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    multiply_add(sums[t][n], upper.x, lower.x, upper.y, lower.y, act[n][i].x, act[n][i].y);
                    multiply_add(sums[t][n], upper.z, lower.z, upper.w, lower.w, act[n][i].z, act[n][i].w);
                }
            }
            if (MOMENTS)  // x times x above, of which the diagonal counts, and ones times x below
#pragma unroll
                for (int n = 0; n < N; n++) {
                    multiply_add(moments[n], act[n][i].x, ONES, act[n][i].y, ONES, act[n][i].x, act[n][i].y);
                    multiply_add(moments[n], act[n][i].z, ONES, act[n][i].w, ONES, act[n][i].z, act[n][i].w);
                }
        }
        if (first + TOGETHER == B) release_stages(place, N_UNITS);
        int column = lane() / 4, row = first + lane() % 4 * 2;
#pragma unroll
        for (int u = 0; u < N_UNITS; u++)
#pragma unroll
            for (int n = 0; n < N; n++)
                *(float2*)(place.partial + ((warp() * 4 + u) * 8 + column) * STRIDE + row + n * 8) =
                    make_float2(sums[u / 2][n][u % 2 * 2], sums[u / 2][n][u % 2 * 2 + 1]);
        if (MOMENTS)
#pragma unroll
            for (int n = 0; n < N; n++) {
                float2* to = &place.shared.moments[warp()][first + n * 8];
                if (lane() % 4 == column / 2) to[column].y = moments[n][column % 2];
                if (column == 0) to[lane() % 4 * 2].x = moments[n][2], to[lane() % 4 * 2 + 1].x = moments[n][3];
            }
    }
    sync();
}

// 4 columns of a unit for a row, summed over warps.
__device__ __forceinline__ float4 total_of(const Place& place, int unit, int half, int row) {
    float v[4] = {};
#pragma unroll
    for (int w = 0; w < WARPS; w++)
#pragma unroll
        for (int c = 0; c < 4; c++) v[c] += place.partial[((w * 4 + unit) * 8 + half * 4 + c) * STRIDE + row];
    return make_float4(v[0], v[1], v[2], v[3]);
}

// The same, scaled by 1 / standard deviation of the row of x.
__device__ __forceinline__ float4 normed_total_of(const Place& place, int unit, int half, int row) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float2 m = place.shared.moments[w][row];
        sum += m.x, squares += m.y;
    }
    float mean = sum / W, scale = rsqrtf(fmaxf(squares / W - mean * mean, 0) + 1e-5f);
    float4 v = total_of(place, unit, half, row);
    return make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
}

// Each thread in turn takes 4 columns (a half) of a unit, for one row.
template <int N_UNITS, class Work>
__device__ __forceinline__ void for_each_half(Work work) {
#pragma unroll 1
    for (int i = thread(); i < N_UNITS * 2 * B; i += THREADS) work(i / (2 * B), i / B % 2, i % B);
}

__device__ __forceinline__ void store_bf16(u16* to, const float4& v) {
    *(uint2*)to = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// Adds to this block's columns of x, and hands them to all.
__device__ __forceinline__ void add_to_residual(Place& place, u16* x, const float4& v, int half, int row) {
    float* mine = &place.shared.residual[half * 4][row];
    float4 sum = make_float4(mine[0] + v.x, mine[B] + v.y, mine[2 * B] + v.z, mine[3 * B] + v.w);
    mine[0] = sum.x, mine[B] = sum.y, mine[2 * B] = sum.z, mine[3 * B] = sum.w;
    store_bf16(x + (size_t)row * W + blockIdx.x * 8 + half * 4, sum);
}

// ---- attention ----

// Queries, new keys and new values of this block's rows into shared memory.
__device__ __forceinline__ void fetch_newest(const Arguments& a, Place& place, int layer) {
    static_assert(SHARE * 24 <= THREADS);
    int i = thread() / 24, which = thread() / 8 % 3, part = thread() % 8;
    if (warp() * 32 < SHARE * 24) await_blocks(a, place, lane() < 8 ? blockIdx.x / 8 * 8 + lane() : -1);
    if (i < SHARE) {
        int row = row_of(a, i);
        const u16* new_key = keys_at(a, layer, row) + place.shared.rows[row].length * 64;
        const u16* from = which == 0   ? a.query + (size_t)row * W + blockIdx.x / 8 * 64
                          : which == 1 ? new_key
                                       : new_key + values_after(a);
        place.shared.newest[i][which][part] = load_cached_l2(from + part * 8);
    }
    sync();
}

// Attention of a row over this warp's share of its positions: a warp takes 4 at a time, 8 lanes and 8 dimensions each.
__device__ __forceinline__ void attend_row(Place& place, int i, int length) {
    constexpr int QUADS = (POSITIONS / 4 + WARPS - 1) / WARPS;  // of a stage, for a warp
    const uint4(&newest)[3][8] = place.shared.newest[i];
    int sub = lane() / 8, part = lane() % 8;
    float q[8], out[8] = {}, peak = -1e30f, sum = 0;
    unpack(q, newest[0][part]);
    if (warp() == i) {  // the newest position is one warp's; its first 8 lanes take it
        float score = score_of(q, newest[1][part]);
        if (sub == 0) peak = score, sum = 1, unpack(out, newest[2][part]);
    }
#pragma unroll 1
    for (int first = 0; first < length; first += POSITIONS) {
        wait_for_stage(place, 0);
        const uint4* stage = (const uint4*)stage_at(place, 0) + part;
        uint4 key[QUADS], value[QUADS];
        auto position = [&](int j) { return (j * WARPS + warp()) * 4 + sub; };
        auto there = [&](int j) { return position(j) < min(POSITIONS, length - first); };
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            key[j] = value[j] = make_uint4(0, 0, 0, 0);
            if (there(j)) key[j] = stage[position(j) * 8], value[j] = stage[(POSITIONS + position(j)) * 8];
        }
        release_stages(place, 1);
        float score[QUADS], highest = peak;
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            score[j] = score_of(q, key[j]);
            if (!there(j)) score[j] = -1e30f;
            highest = fmaxf(highest, score[j]);
        }
        float rescale = power_of_2(peak - highest);
        peak = highest, sum *= rescale;
#pragma unroll
        for (int d = 0; d < 8; d++) out[d] *= rescale;
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            float weight = there(j) ? power_of_2(score[j] - peak) : 0, v[8];
            unpack(v, value[j]);
            sum += weight;
#pragma unroll
            for (int d = 0; d < 8; d++) out[d] = fmaf(weight, v[d], out[d]);
        }
    }
    float highest = fmaxf(peak, __shfl_xor_sync(~0u, peak, 8));  // over the warp's 4 groups of 8 lanes
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 16));
    float rescale = power_of_2(peak - highest);
    sum *= rescale;
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
#pragma unroll
    for (int d = 0; d < 8; d++) {
        out[d] *= rescale;
        out[d] += __shfl_xor_sync(~0u, out[d], 8);
        out[d] += __shfl_xor_sync(~0u, out[d], 16);
    }
    if (sub == 0) {
        float4* to = (float4*)(place.partial + (i * WARPS + warp()) * 64 + part * 8);
        to[0] = make_float4(out[0], out[1], out[2], out[3]), to[1] = make_float4(out[4], out[5], out[6], out[7]);
        if (part == 0) place.shared.part_scale[i][warp()] = make_float2(highest, sum);
    }
}

// A row's output, of all warps' parts: 2 dimensions a lane.
__device__ __forceinline__ void combine_row(const Arguments& a, const Place& place, int i) {
    const float2(&scale)[WARPS] = place.shared.part_scale[i];
    float top = -1e30f, total = 0, x = 0, y = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, scale[w].x);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float weight = power_of_2(scale[w].x - top);
        float2 v = *(const float2*)(place.partial + (i * WARPS + w) * 64 + lane() * 2);
        total = fmaf(weight, scale[w].y, total), x = fmaf(weight, v.x, x), y = fmaf(weight, v.y, y);
    }
    u16* to = a.attended + (size_t)row_of(a, i) * W + blockIdx.x / 8 * 64 + lane() * 2;
    *(u32*)to = pack_bf16(x / total, y / total);
}

__device__ __forceinline__ void attend(const Arguments& a, Place& place, int layer) {
    fetch_newest(a, place, layer);
#pragma unroll 1
    for (int i = 0; i < SHARE; i++) {
        const RowState& row = place.shared.rows[row_of(a, i)];
        if (row.running) attend_row(place, i, row.length);
    }
    sync();
    if (warp() < SHARE && place.shared.rows[row_of(a, warp())].running) combine_row(a, place, warp());
}

// ---- a step ----

__device__ __forceinline__ void embed(const Arguments& a, Place& place) {
    for_each_half<1>([&](int, int half, int row) {
        float x[4];
        int column = blockIdx.x * 8 + half * 4;
        embedding(x, a.embedding, a.positions, place.shared.rows[row], column);
        for (int c = 0; c < 4; c++) place.shared.residual[half * 4 + c][row] = x[c];
        store_bf16(a.x + (size_t)row * W + column, make_float4(x[0], x[1], x[2], x[3]));
    });
}

// The 4 blocks that make 32 columns of the MLP's output: block % 4 = s has the sums of piece s of k, and adds up unit s.
__device__ __forceinline__ void exchange_sums(const Arguments& a, Place& place, u32 odd) {
    constexpr int PIECE = 2 * B * 16;  // bytes
    int mine = blockIdx.x % 4, first = blockIdx.x - mine;
    for_each_half<4>([&](int unit, int half, int row) {
        if (unit == mine) return;
        float4 v = total_of(place, unit, half, row);
        publish(a.exchange + ((size_t)(first + unit) * 4 + mine) * PIECE + (half * B + row) * 16,
                as_words(v.x, v.y, v.z, v.w), odd);
    });
    for_each_half<1>([&](int, int half, int row) {
        const u8* from = a.exchange + (size_t)blockIdx.x * 4 * PIECE + (half * B + row) * 16;
        float4 own = total_of(place, mine, half, row), v = make_float4(0, 0, 0, 0);
        uint4 packets[3];
        await(
            packets, [&](int i) { return from + (i + (i >= mine)) * PIECE; },
            [&](const uint4& packet) { return (packet.x & 1) == odd; });
#pragma unroll
        for (int s = 0; s < 4; s++) {  // in one order for all
            uint4 p = s == mine ? as_words(own.x, own.y, own.z, own.w)
                                : packets[0];
            if (s != mine && s > 0) p = s - (s > mine) == 1 ? packets[1] : s - (s > mine) == 2 ? packets[2] : packets[0];
            v.x += __uint_as_float(p.x), v.y += __uint_as_float(p.y), v.z += __uint_as_float(p.z),
                v.w += __uint_as_float(p.w);
        }
        add_to_residual(place, a.x, v, half, row);
    });
}

__device__ __forceinline__ void layer_step(const Arguments& a, Place& place, int layer, u32 odd) {
    uint4 act[N][PAIRS];
    await_blocks(a, place, maker_of_slice<4>());
    multiply<3, true>(place, act, a.x, W, false);
    for_each_half<3>([&](int unit, int half, int row) {
        float4 v = normed_total_of(place, unit, half, row);
        int column = blockIdx.x % 8 * 8 + half * 4;
        const RowState& state = place.shared.rows[row];
        if (unit == 0) return store_bf16(a.query + (size_t)row * W + blockIdx.x / 8 * 64 + column, v);
        if (!state.running) return;
        store_bf16(keys_at(a, layer, row) + (unit - 1) * values_after(a) + state.length * 64 + column, v);
        asm volatile("fence.proxy.async;" ::: "memory");  // later steps read it by bulk copies
    });
    publish_phase(a, place);

    attend(a, place, layer);
    publish_phase(a, place);

    await_blocks(a, place, maker_of_slice<8, 2>());
    multiply<1, false>(place, act, a.attended, W, false);
    for_each_half<1>([&](int, int half, int row) {
        add_to_residual(place, a.middle, total_of(place, 0, half, row), half, row);
    });
    publish_phase(a, place);

    await_blocks(a, place, maker_of_slice<4>());
    multiply<4, true>(place, act, a.middle, W, false);
    for_each_half<4>([&](int unit, int half, int row) {
        float4 v = normed_total_of(place, unit, half, row);
        store_bf16(a.hidden + (size_t)row * (4 * W) + blockIdx.x * 32 + unit * 8 + half * 4,
                   make_float4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w)));
    });
    publish_phase(a, place);

    int piece = blockIdx.x % 4, maker = maker_of_slice<1>();
    await_blocks(a, place, lane() < PAIRS && maker >= 0 ? piece * SLICES + maker : -1);
    multiply<4, false>(place, act, a.hidden + piece * W, 4 * W, false);
    exchange_sums(a, place, odd);
    publish_phase(a, place);
}

// This block's share of each row's logits, of the codebook at which the row stands.
__device__ __forceinline__ void head_step(const Arguments& a, Place& place, int step) {
    uint4 act[N][PAIRS];
    await_blocks(a, place, maker_of_slice<4>());
    bool loaded = false;
#pragma unroll 1
    for (int book = 0; book < N_BOOKS; book++) {
        if (a.one_book && book != book_of(a, 0, step)) continue;
#pragma unroll 1
        for (int first = 0; first < HEAD_UNITS; first += HEAD_GROUP) {
            multiply<HEAD_GROUP, true>(place, act, a.x, W, loaded);
            loaded = true;
            for_each_half<HEAD_GROUP>([&](int unit, int half, int row) {
                float4 v = normed_total_of(place, unit, half, row);
                if (book == book_of(a, row, step))
                    *(float4*)(a.logits + (size_t)row * PADDED + (blockIdx.x * HEAD_UNITS + first + unit) * 8 +
                               half * 4) = v;
            });
            sync();
        }
    }
}

// The smallest logit of a row that top-p and top-k keep, as `ordered` has it.
__device__ __noinline__ u32 least_kept(const float* logits, const Row& row, float* scratch) {
    constexpr int EACH = (BOOK_SIZE + THREADS - 1) / THREADS;
    float x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = thread() + i * THREADS < BOOK_SIZE ? __ldcg(logits + thread() + i * THREADS) : NEVER;
    return smallest_kept<WARPS>(x, row, scratch, 1);
}

// Draws a row's token, and says so to all.
__device__ void draw(const Arguments& a, Shared& shared, int b, int step) {
    const Row& row = a.rows[b];
    const RowState& state = shared.rows[b];
    const float *logits = a.logits + (size_t)b * PADDED, *noise = a.noise + (size_t)b * PADDED;
    u32 least = row.top_p < 1 || row.top_k > 0 ? least_kept(logits, row, shared.scratch) : 0;
    Candidate best = nothing();
#pragma unroll 4
    for (int i = thread(); i < BOOK_SIZE; i += THREADS) {
        float logit = __ldcg(logits + i), hidden = row.temperature != 0 ? __ldcg(noise + i) : 0;
        best = combine(best, consider(ordered(logit) < least ? NEVER : logit, hidden, i, END, row));
    }
    best = combine_warp(best);
    if (lane() == 0) shared.candidates[warp()] = best;
    sync();
    if (warp() == 0) {
        best = combine_warp(lane() < WARPS ? shared.candidates[lane()] : nothing());
        bool ended = ends(best, END, row);
        if (lane() == 0) {
            if (!ended) a.tokens[b * BLOCK_SIZE + state.n_drawn] = best.index;
            publish_numbered(a.drawn + b * 16, best.index, ended, 0, step + 1);
        }
    }
    sync();
}

// All rows' tokens: each of the first blocks draws a row's, and every block hears of all.
__device__ __forceinline__ void draw_step(const Arguments& a, Shared& shared, const Place& place, int step) {
    if (blockIdx.x < B) {
        if (warp() * 32 < BLOCKS) await_blocks(a, place, thread() < BLOCKS ? thread() : -1);
        sync();
#pragma unroll 1
        for (int b = blockIdx.x; b < B; b += BLOCKS)
            if (shared.rows[b].running) draw(a, shared, b, step);
    }
    sync();
    if (thread() < B && shared.rows[thread()].running) {
        RowState& state = shared.rows[thread()];
        uint4 packet[1];
        await(
            packet, [&](int) { return a.drawn + thread() * 16; },
            [&](const uint4& drawn) { return drawn.w == step + 1; });
        state.ended = packet[0].y;
        state.n_drawn += !state.ended;
        state.running = !state.ended && state.n_drawn < a.rows[thread()].n_tokens;
        if (state.running) {
            state.length++;
            state.ids[0] = FIRST_ID + book_of(a, thread(), step) * BOOK_SIZE + packet[0].x;
            state.ids[1] = NO_ID;
        }
    }
    sync();
}

// ---- the helping warp: the noise of this block's share of the vocabulary ----

__device__ void helping_warp(const Arguments& a, Shared& shared) {
    for (int step = 0; step < a.n_steps; step++) {
#pragma unroll 1
        for (int i = lane(); i < B * HEAD_UNITS; i += 32) {
            int b = i / HEAD_UNITS, unit = blockIdx.x * HEAD_UNITS + i % HEAD_UNITS;
            const Row& row = a.rows[b];
            if (shared.rows[b].running && row.temperature != 0)
                gumbel_block(a.noise + (size_t)b * PADDED + unit * 8, row.seed, STAGE, row.position + step, unit);
        }
        sync_threads(2, THREADS + 32);  // noise ready
        if (step + 1 < a.n_steps) sync_threads(3, THREADS + 64);  // noise used, rows' states moved on
        if (shared.stop) return;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1) decode(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ Shared shared;
    if (thread() == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], WARPS);
        barrier_init_fence();
        shared.stop = 0;
    }
    if (thread() < B) {
        const Row& row = a.rows[thread()];
        shared.rows[thread()] = {row.length, {row.ids[0], row.ids[1]}, 0, row.n_tokens > 0, 0};
    }
    __syncthreads();
    if (warp() == WARPS) return copying_warp(a, shared, memory);
    if (warp() == WARPS + 1) return helping_warp(a, shared);
    Place place = {shared, memory, (float*)(memory + STAGES * UNIT), 0, 0};
    for (int step = 0; step < a.n_steps; step++) {
        embed(a, place);
        publish_phase(a, place);
#pragma unroll 1
        for (int layer = 0; layer < N_LAYERS; layer++) layer_step(a, place, layer, (step * N_LAYERS + layer + 1) & 1);
        head_step(a, place, step);
        sync_threads(2, THREADS + 32);  // the noise is ready
        publish_phase(a, place);
        draw_step(a, shared, place, step);
        bool running = false;
        for (int b = 0; b < B; b++) running |= shared.rows[b].running != 0;
        if (!running && thread() == 0) shared.stop = 1;
        if (step + 1 < a.n_steps) sync_threads(3, THREADS + 64);
        if (!running) break;
    }
    if (blockIdx.x == 0 && thread() < B) {
        a.result[thread() * 2] = shared.rows[thread()].n_drawn;
        a.result[thread() * 2 + 1] = shared.rows[thread()].ended;
    }
}
