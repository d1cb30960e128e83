// n decode steps of a causal GPT for 8 to 64 rows in one launch: one block per multiprocessor, all of them working on
// every matrix, and all memory traffic in one stream. docs/performance.md has the measurements behind each choice.
//
// - All that a step reads from memory, weights as well as keys and values, passes through a ring of stages in shared
//   memory, in the order of use. One warp copies, as far ahead as the ring goes: while blocks wait for one another the
//   next matrices, or the next layer's keys, arrive.
// - Each block owns 8 columns of x, 24 of q | k | v (those of head block / 8), 32 of the MLP's hidden layer, and the
//   attention of an eighth of the rows for its head. The MLP's second product is split over k besides, because every
//   block reading all of the hidden layer would take longer than the weights: 4 blocks make 32 columns together, each
//   from a quarter of k, and exchange sums.
// - Activations lie in global memory (so in L2), row after row, and are loaded straight into the tensor cores' right
//   operand; weights are the left one. Products are split over k by warp.
// - Blocks exchange activations as packets of 16 bytes whose lowest bit says which turn they belong to, an even or an
//   odd one, and the reader polls the data itself (as in decode.cu). A flag would cost four trips to L2 in place of
//   two: under load a fence alone took 2,500 cycles. One buffer is enough: whoever writes it again has received what
//   was made by blocks that had received all that was in it.
// - What streams through is marked as first to leave L2, or it would drive out what blocks exchange. And little of it is on its way
//   at once while a block polls, much while it computes attention.
// - Layer norm: as in decode.cu.
#include "decode.cuh"

constexpr int POSITIONS = UNIT / (2 * CACHED);           // whose keys and values fill a stage: as much as a unit of weights,
constexpr int STAGE_BYTES = UNIT + (BYTES_CACHED ? POSITIONS * 8 : 0);  // and, behind them, their scales
constexpr int PART = B <= (QUANTIZED ? 24 : 8) ? B : B == 24 ? 8 : B / 2;  // rows that go through a phase together
constexpr int TEAM = 2, TEAMS = WARPS / TEAM;            // warps that take a stage of keys and values together
constexpr int SHARE = B / 8;                             // rows whose attention a block computes
static_assert(B % 8 == 0 && B % PART == 0);
constexpr int PADDED = BLOCKS * HEAD_UNITS * 8;          // logits of a row
// Cycles before a block looks for what others have said
constexpr int UP_DELAY = QUANTIZED && B < 32 ? 900 : 500, NEWEST_DELAY = B < 32 ? 600 : 1200;
constexpr int HEAD_GROUP = HEAD_UNITS % 4 == 0 ? 4 : 2;  // units of the head that are multiplied together

struct Arguments {
    const u8* weights;       // [BLOCKS][ALL_UNITS][UNIT]
    const u16* embedding;    // [ids][W], bf16
    const float* positions;  // [BLOCK_SIZE][W]
    const float* scales;     // [BLOCKS][ALL_UNITS][8], of quantized weights
    u8* cache;               // see cache.cuh
    float* cache_scales;
    // Packets, and numbers of steps: zero at the start
    u8 *x, *middle;         // [B][W] pairs (bf16, or f16): the input of attention, and of the MLP
    u8* qkv;                // [3][B][W] pairs
    u8* attended;           // [B][W] pairs
    u8* hidden;             // [B][4 W] pairs
    u8* exchange;           // [BLOCKS][4 sources][B][2 halves]: partial sums of the MLP's output
    u8* drawn;              // [B]: token, whether it ended, whether the host halts the launch, step + 1
    u32* logits_ready;      // [BLOCKS]: step + 1
    float *logits, *noise;  // [B][PADDED]
    int* tokens;            // [B][BLOCK_SIZE]: vocabulary indices within the book
    int* result;            // [B][2]: how many tokens, and whether speech ended
    const u64* halted;      // the host's, see `is_halted`
    int n_slots, n_steps;
    u64 launch;  // its number
    int one_book;  // all rows stand at the same codebook, so the others need not be computed
    u8 order[B];   // [8 ranks][SHARE]: rows dealt to a head's blocks
    Row rows[B];
};

struct Shared {
    u64 full[STAGES], empty[STAGES];
    __align__(16) uint4 newest[SHARE][3][8];  // query, key and value of the positions being fed
    float2 moments[WARPS][B];                 // of a warp's slices of x: sum, and sum of squares
    __align__(16) float4 residual[B][2];      // this block's columns of x, in full precision
    float2 part_scale[SHARE][WARPS];          // attention of a warp's positions: peak and sum
    Candidate candidates[WARPS];
    float scratch[WARPS];
    RowState rows[B];
    int stop, halting;  // the latter: all blocks know that the host wants no further step
    bool is_halted;     // this one does
    volatile int attending;  // the computing warps: nobody polls
};

__device__ __forceinline__ int row_of(const Arguments& a, int i) { return a.order[blockIdx.x % 8 * SHARE + i]; }
__device__ __forceinline__ int book_of(const Arguments& a, int row, int step) {
    return (a.rows[row].position + step) % N_BOOKS;
}

// ---- the copying warp, of which one lane works ----

struct Copier {
    const Arguments& a;
    Shared& shared;
    u8* stages;
    u32 n;  // stages filled so far

    __device__ void land(u32 i) { barrier_wait(&shared.full[i % STAGES], i / STAGES & 1); }
    // The next stage, when it is free. Only so many are on their way at once: what others poll waits behind them.
    __device__ u64* next(u32 bytes, u32 in_flight) {
        barrier_wait(&shared.empty[n % STAGES], (n / STAGES & 1) ^ 1);
        if (n >= in_flight) land(n - in_flight);
        u64* full = &shared.full[n % STAGES];
        barrier_expect(full, bytes);
        return full;
    }
    __device__ void units(int block, int first, int count) {
        for (int i = 0; i < count; i++, n++) {
            u64* full = next(UNIT, WEIGHTS_IN_FLIGHT);
            const u8* from = a.weights + ((size_t)block * ALL_UNITS + first + i) * UNIT;
            copy_once_to_shared(stages + n % STAGES * STAGE_BYTES, from, UNIT, full);
        }
    }
    __device__ void keys_and_values(int layer) {
        for (int i = 0; i < SHARE; i++) {
            int row = row_of(a, i), length = shared.rows[row].running ? shared.rows[row].length : 0;
            size_t keys = head_at(a, layer, row), values = keys + values_after(a);
            for (int first = 0; first < length; first += POSITIONS, n++) {
                int count = min(POSITIONS, length - first), bytes = count * CACHED, of_scales = (count + 3) / 4 * 16;
                bool nobody_polls = !UNDER_RACECHECK && shared.attending;  // in no order with its writers: nothing but speed hangs on it
                u32 in_flight = nobody_polls ? MOST_KEYS_IN_FLIGHT : KEYS_IN_FLIGHT;
                u64* full = next(2 * bytes + (BYTES_CACHED ? 2 * of_scales : 0), in_flight);
                u8* stage = stages + n % STAGES * STAGE_BYTES;
                copy_once_to_shared(stage, a.cache + (keys + first) * CACHED, bytes, full);
                copy_once_to_shared(stage + UNIT / 2, a.cache + (values + first) * CACHED, bytes, full);
                if (BYTES_CACHED) {
                    copy_once_to_shared(stage + UNIT, a.cache_scales + keys + first, of_scales, full);
                    copy_once_to_shared(stage + UNIT + POSITIONS * 4, a.cache_scales + values + first, of_scales, full);
                }
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
            __syncwarp();
            if (layer == 0) {  // the rows' new states, and the keys that were written in the step before
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
    float* partial;       // [WARPS][4 units][B rows][8 columns]
    const float* scales;  // [ALL_UNITS][8]: this block's
    u32 n_taken;          // stages
    u32 turn, x_turn;  // of which the lowest bit marks packets: layers so far, and times that x was written
};

// Stages are taken in the order in which they were filled; i: how many after the next one.
__device__ __forceinline__ const u8* stage_at(const Place& place, int i) {
    return place.stages + (place.n_taken + i) % STAGES * STAGE_BYTES;
}
__device__ __forceinline__ void wait_for_stage(const Place& place, int i) {
    u32 n = place.n_taken + i;
    barrier_wait(&place.shared.full[n % STAGES], n / STAGES & 1);
}
__device__ __forceinline__ void release_stages(Place& place, int n) {
    __syncwarp();
    if (lane() < ARRIVING_LANES)
        for (int i = 0; i < n; i++) barrier_arrive(&place.shared.empty[(place.n_taken + i) % STAGES]);
    place.n_taken += n;
}

// 8 columns of a row, of which this lane has 4 and its neighbour the others, as a packet. The first one gets the turn's lowest
// bit; a bf16 is rounded to the nearest number that has it.
__device__ __forceinline__ void publish_halves(u8* to, const float4& v, u32 turn) {
    u32 low = pack_pair(v.x, v.y), high = pack_pair(v.z, v.w);
    if (QUANTIZED) {
        if (lane() % 2 == 0) low = (low & ~1u) | (turn & 1);
    } else {
        u32 odd = (turn & 1) << 16, first = ((__float_as_uint(v.x) - odd + 0x10000u) & ~0x1ffffu) + odd;
        if (lane() % 2 == 0) low = first >> 16 | pack_bf16(0, v.y);
    }
    u32 next_low = __shfl_down_sync(~0u, low, 1), next_high = __shfl_down_sync(~0u, high, 1);
    if (lane() % 2 == 0) store_packet(to, (u64)high << 32 | low, (u64)next_high << 32 | next_low);
}

__device__ __forceinline__ bool is_of(const uint4& packet, u32 turn) { return ((packet.x ^ turn) & 1) == 0; }

// Does this warp have an i-th slice of k?
__device__ __forceinline__ bool has_slice(int i) { return EVEN || slice_of(i) < SLICES; }

// Loads activations of this warp's slices for 8 N rows, from row `first` on: packets of everybody, ready or not.
// x: [B][n_columns]
template <int N>
__device__ __forceinline__ void load_rows(uint4 (&act)[N][PAIRS], const u8* x, int n_columns, int first) {
    const u8* mine = x + ((size_t)(first + lane() / 4) * n_columns + slice_of(0) * 32 + lane() % 4 * 8) * 2;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            act[n][i] = make_uint4(0, 0, 0, 0);
            if (has_slice(i)) act[n][i] = peek(mine + (n * 8 * n_columns + i * (EVEN ? 1 : WARPS) * 32) * 2);
        }
}

// Loads them again until they are of the turn.
template <int N>
__device__ __forceinline__ void await_rows(uint4 (&act)[N][PAIRS], const u8* x, int n_columns, int first, u32 turn) {
    u32 patience = PATIENCE;
    while (true) {
        bool ready = true;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < PAIRS; i++) ready &= !has_slice(i) || is_of(act[n][i], turn);
        if (__all_sync(~0u, ready)) return;
        if (--patience == 0) __trap();
        load_rows(act, x, n_columns, first);
    }
}

// Polls a few packets of what will be loaded, 8 lanes for each of this warp's slices: everybody polling everything
// would keep L2 busy. part, row: which of the slice's 4 packets, of which row.
__device__ __forceinline__ void probe_rows(const u8* x, int n_columns, int row, int part, u32 turn) {
    if (lane() / 8 < PAIRS && has_slice(lane() / 8)) {
        const u8* from = x + ((size_t)row * n_columns + slice_of(lane() / 8) * 32 + part * 8) * 2;
        uint4 packet[1];
        await(
            packet, [&](int) { return from; }, [&](const uint4& packet) { return is_of(packet, turn); });
    }
    __syncwarp();
}

// Where a row's 8 columns of a warp's partial sums lie: rows are shuffled so that no two banks meet.
__device__ __forceinline__ int sum_at(int w, int unit, int row) {
    return ((w * 4 + unit) * B + (row ^ (row >> 2 & 1))) * 8;
}

// sums of N_UNITS units over this warp's slices of k, for 8 N rows of which `act` has the activations, into `partial`;
// the moments of x beside them. last: the units are not needed again.
template <int N_UNITS, bool MOMENTS, int N>
__device__ __forceinline__ void multiply(Place& place, const uint4 (&act)[N][PAIRS], int first, bool last) {
    constexpr int TILES = (N_UNITS + 1) / 2;
#pragma unroll
    for (int i = 0; i < N_UNITS; i++) wait_for_stage(place, i);
    constexpr bool AS_RAISED = QUANTIZED && (MOMENTS || N_UNITS > 1);  // then moments tell by how much sums are too large
    float sums[TILES][N][4] = {}, moments[N][4] = {};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (!has_slice(i)) break;
        int at = slice_of(i) * 32 + lane();
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            uint4 upper = weights_at<AS_RAISED>(stage_at(place, 2 * t), at), lower = make_uint4(0, 0, 0, 0);
            if (2 * t + 1 < N_UNITS) lower = weights_at<AS_RAISED>(stage_at(place, 2 * t + 1), at);
#pragma unroll
            for (int n = 0; n < N; n++) {
                multiply_add<QUANTIZED>(sums[t][n], upper.x, lower.x, upper.y, lower.y, act[n][i].x, act[n][i].y);
                multiply_add<QUANTIZED>(sums[t][n], upper.z, lower.z, upper.w, lower.w, act[n][i].z, act[n][i].w);
            }
        }
        if (MOMENTS || AS_RAISED)  // x times x above, of which the diagonal counts, and ones times x below
#pragma unroll
            for (int n = 0; n < N; n++) {
                multiply_add<QUANTIZED>(moments[n], act[n][i].x, ONES, act[n][i].y, ONES, act[n][i].x, act[n][i].y);
                multiply_add<QUANTIZED>(moments[n], act[n][i].z, ONES, act[n][i].w, ONES, act[n][i].z, act[n][i].w);
            }
    }
    if (AS_RAISED)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < TILES * 4; i++) sums[i / 4][n][i % 4] -= RAISED * moments[n][2 + i % 2];
    if (last) release_stages(place, N_UNITS);
    if (first == 0) sync();  // the sums before have been read
    int column = lane() / 4, row = first + lane() % 4 * 2;
#pragma unroll
    for (int u = 0; u < N_UNITS; u++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                place.partial[sum_at(warp(), u, row + n * 8 + j) + column] = sums[u / 2][n][u % 2 * 2 + j];
    if (MOMENTS)
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2* to = &place.shared.moments[warp()][first + n * 8];
            if (lane() % 4 == column / 2) to[column].y = column % 2 ? moments[n][1] : moments[n][0];
            if (column == 0) to[lane() % 4 * 2].x = moments[n][2], to[lane() % 4 * 2 + 1].x = moments[n][3];
        }
    sync();
}

// 4 columns (a half) of a unit for a row, summed over warps.
__device__ __forceinline__ float4 total_of(const Place& place, int unit, int row, int half) {
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float4 v = *(const float4*)(place.partial + sum_at(w, unit, row) + half * 4);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

// The same, of the unit of this block that its weights' scales go by.
__device__ __forceinline__ float4 scaled(const Place& place, const float4& v, int unit, int half) {
    if (!QUANTIZED) return v;
    float4 scale = *(const float4*)(place.scales + unit * 8 + half * 4);
    return make_float4(v.x * scale.x, v.y * scale.y, v.z * scale.z, v.w * scale.w);
}

// The same, scaled by 1 / standard deviation of the row of x. first_unit: the phase's.
__device__ __forceinline__ float4 normed_total_of(const Place& place, int first_unit, int unit, int row, int half) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float2 m = place.shared.moments[w][row];
        sum += m.x, squares += m.y;
    }
    float mean = sum / W, scale = rsqrtf(fmaxf(squares / W - mean * mean, 0) + 1e-5f);
    float4 v = scaled(place, total_of(place, unit, row, half), first_unit + unit, half);
    return make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
}

// Neighbouring lanes take the halves of a unit for a row, of rows first ... + ROWS. Whole warps: lanes that have
// nothing left repeat what others of their warp do.
template <int N_UNITS, int ROWS, class Work>
__device__ __forceinline__ void for_each_half(int first, Work work) {
    constexpr int N = N_UNITS * 2 * ROWS;
    static_assert(N % 32 == 0 || N % 32 == 16);
#pragma unroll 1
    for (int i = thread(); i - lane() < N; i += THREADS) {
        int mine = i < N ? i : i - 16;
        work(mine / (2 * ROWS), first + mine / 2 % ROWS, mine % 2);
    }
}

// One phase: N_UNITS units times x [B][n_columns], packets of a turn; then `work` for each half of a unit and row. Rows
// go through in parts: while one part is worked on, what others make of the part before arrives.
template <int N_UNITS, bool MOMENTS, int DELAY = 0, class Work>
__device__ __forceinline__ void phase(Place& place, const u8* x, int n_columns, u32 turn, int probed_row,
                                      int probed_part, Work work) {
    uint4 act[PART / 8][PAIRS];
    let_pass<DELAY>();
    probe_rows(x, n_columns, probed_row, probed_part, turn);
    load_rows(act, x, n_columns, 0);
#pragma unroll 1
    for (int first = 0; first < B; first += PART) {
        await_rows(act, x, n_columns, first, turn);
        multiply<N_UNITS, MOMENTS>(place, act, first, first + PART == B);
        if (first + PART < B) load_rows(act, x, n_columns, first + PART);
        for_each_half<N_UNITS, PART>(first, work);
    }
}

// Adds to this block's columns of x (or sets them), and hands them to all.
__device__ __forceinline__ void add_to_residual(Place& place, u8* x, const float4& v, int row, int half, u32 turn,
                                                bool set = false) {
    float4* mine = &place.shared.residual[row][half];
    float4 sum = *mine;
    if (set) sum = make_float4(0, 0, 0, 0);
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    __syncwarp();
    *mine = sum;
    publish_halves(x + ((size_t)row * W + blockIdx.x * 8) * 2, sum, turn);
}

// ---- attention ----

// Queries, new keys and new values of this block's rows into shared memory, and those of rows that run into the cache.
__device__ __forceinline__ void fetch_newest(const Arguments& a, Place& place, int layer) {
    static_assert(SHARE * 24 <= THREADS);
    int i = thread() / 24, which = thread() / 8 % 3, part = thread() % 8, row = row_of(a, min(i, SHARE - 1));
    uint4 packet[1] = {};
    let_pass<NEWEST_DELAY>();
    if (i < SHARE) {
        const u8* from = a.qkv + ((size_t)(which * B + row) * W + blockIdx.x / 8 * 64 + part * 8) * 2;
        await(
            packet, [&](int) { return from; }, [&](const uint4& packet) { return is_of(packet, place.turn); });
        place.shared.newest[i][which][part] = packet[0];
    }
    __syncwarp();
    const RowState& state = place.shared.rows[row];
    size_t to = head_at(a, layer, row) + (which == 2 ? values_after(a) : 0);
    u8* eight = a.cache + to * CACHED + cached_at(state.length, part);
    bool goes = i < SHARE && which && state.running;
    if (BYTES_CACHED) {
        float v[8];
        unpack(v, packet[0]);
        float scale = scale_of_eights(v);
        if (goes) *(uint2*)eight = as_bytes(v, scale);
        if (goes && part == 0) a.cache_scales[to + state.length] = scale;
    } else if (goes) {
        *(uint4*)eight = packet[0];
    }
    sync();
}

// 8 positions' scores of this warp, two a lane; all 16 rows of the left operand are the same query. excess: what raised keys add.
__device__ __forceinline__ float2 scores_of(const u32 (&q)[8], const u8* keys, int row, int position, float excess) {
    float sums[2][4] = {};
    u32 k[BYTES_CACHED ? 1 : 2][4];
#pragma unroll
    for (int i = 0; i < (BYTES_CACHED ? 1 : 2); i++)
        load_matrices(k[i], shared_address(keys) + row * CACHED + cached_piece(position, i * 4 + lane() / 8) * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // of 16 dimensions; bytes 4 t ... of a piece are its columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9
        u32 first = BYTES_CACHED ? bytes_raised(k[0][i], BYTES_01) : k[i / 2 % 2][i % 2 * 2],
            second = BYTES_CACHED ? bytes_raised(k[0][i], BYTES_23) : k[i / 2 % 2][i % 2 * 2 + 1];
        multiply_add<BYTES_CACHED>(sums[i % 2], q[2 * i], q[2 * i], q[2 * i + 1], q[2 * i + 1], first, second);
    }
    return make_float2((sums[0][0] + sums[1][0] - excess) * SCORE_SCALE, (sums[0][1] + sums[1][1] - excess) * SCORE_SCALE);
}

// A position's values as the tensor cores want them: of dimensions 8 d ... (or, of bytes, as dimension_of says), d = 0 ... 7.
__device__ __forceinline__ void load_values(u32 (&v)[8], const u8* values, int row, int position) {
    u32 pieces[BYTES_CACHED ? 1 : 2][4];
#pragma unroll
    for (int i = 0; i < (BYTES_CACHED ? 1 : 2); i++)
        load_transposed(pieces[i], shared_address(values) + row * CACHED + cached_piece(position, i * 4 + lane() / 8) * 16);
#pragma unroll
    for (int d = 0; d < 8; d++)
        v[d] = BYTES_CACHED ? bytes_raised(pieces[0][d / 2], d % 2 ? BYTES_13 : BYTES_02)
                         : pieces[d / 4 % (BYTES_CACHED ? 1 : 2)][d % 4];
}

// Which dimension out[d][j] of this lane is: the even ones of 16, then the odd ones, if two of them came as one element.
__device__ __forceinline__ int dimension_of(int d, int j) {
    return BYTES_CACHED ? d / 2 * 16 + lane() % 4 * 4 + j * 2 + d % 2 : d * 8 + lane() % 4 * 2 + j;
}

// Attention of a row over this warp's share of its positions, by tensor cores. Teams of warps take stages in turn, across rows, so
// that a warp has several tiles of 8 positions to work on at once; `turn`: whose turn it is with the row's first stage. The powers of
// the scores come out where the left operand of powers times values wants them.
//
// A warp waits for its own stages only. A barrier tells a turn of the ring from the next one and no further, so those TEAMS stages on
// must not be more than a turn ahead of what has surely landed.
__device__ __forceinline__ void attend_row(Place& place, int i, int length, int turn) {
    // A stage of many positions is gone through in halves: a warp has registers for so many tiles.
    constexpr int TOGETHER = POSITIONS <= 64 ? POSITIONS : (POSITIONS / 2 + 7) / 8 * 8;
    constexpr int TILES = ((TOGETHER + 7) / 8 + TEAM - 1) / TEAM;
    static_assert(STAGES - MOST_KEYS_IN_FLIGHT >= TEAMS && MOST_KEYS_IN_FLIGHT >= KEYS_IN_FLIGHT);
    // The first team is the one whose turn it is: so a row's sums do not depend on the rows before it.
    int team = (warp() / TEAM + TEAMS - turn) % TEAMS, me = team * TEAM + warp() % TEAM;
    constexpr float HEADROOM = 8;  // powers of 2 by which a score may exceed the peak so far
    const uint4(&newest)[3][8] = place.shared.newest[i];
    const u32* query = (const u32*)newest[0];
    u32 q[8];
#pragma unroll
    for (int k = 0; k < 8; k++)
        q[k] = as_attended(query[BYTES_CACHED ? k / 2 * 8 + lane() % 4 * 2 + k % 2 : k * 4 + lane() % 4]);
    // Bytes go in raised. What that adds to scores, and to sums of values: RAISED times the query's sum, and times that of the powers.
    float out[8][4] = {}, peak = -1e30f, sum = 0, of_query[4] = {}, of_powers[4] = {};
    if (BYTES_CACHED)
#pragma unroll
        for (int k = 0; k < 8; k += 2)
            multiply_add<BYTES_CACHED>(of_query, q[k], q[k], q[k + 1], q[k + 1], ATTENDED_ONES, ATTENDED_ONES);
    if (me == WARPS - 1) {  // the newest position is one warp's, always the same
        float eight[2][8];
        unpack(eight[0], newest[0][lane() % 8]), unpack(eight[1], newest[1][lane() % 8]);
        peak = score_of(eight[0], eight[1]), sum = lane() % 4 == 0;
        const u32* value = (const u32*)newest[2];
#pragma unroll
        for (int d = 0; d < 8; d++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int of = dimension_of(d, j);
                out[d][j] = of % 2 ? high_of(value[of / 2]) : low_of(value[of / 2]);
            }
    }
#pragma unroll 1
    for (int taken = team; taken * POSITIONS < length; taken += TEAMS) {
        wait_for_stage(place, taken);
        const u8* stage = stage_at(place, taken);
        int first = taken * POSITIONS, n = min(POSITIONS, length - first);
#pragma unroll 1
        for (int half = 0; half < (TOGETHER < POSITIONS ? n : 1); half += TOGETHER) {
            auto begin = [&](int tile) { return half + (tile * TEAM + warp() % TEAM) * 8; };
            auto row = [&](int tile) { return min(begin(tile) + lane() % 8, n - 1); };  // nothing else may be read
            float2 score[TILES];
            float higher = -1e30f;
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                score[tile] = scores_of(q, stage, row(tile), first + row(tile), RAISED * of_query[0]);
                int mine = begin(tile) + lane() % 4 * 2;
                if (BYTES_CACHED) {
                    float2 by = *(const float2*)(stage + UNIT + mine * 4);
                    score[tile] = make_float2(score[tile].x * by.x, score[tile].y * by.y);
                }
                score[tile] = make_float2(mine < n ? score[tile].x : -1e30f, mine + 1 < n ? score[tile].y : -1e30f);
                higher = fmaxf(higher, fmaxf(score[tile].x, score[tile].y));
            }
            if (__any_sync(~0u, higher > peak + HEADROOM)) {
                higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
                higher = fmaxf(peak, fmaxf(higher, __shfl_xor_sync(~0u, higher, 2)));
                float rescale = power_of_2(peak - higher);
                peak = higher, sum *= rescale;
#pragma unroll
                for (int d = 0; d < 8; d++) out[d][0] *= rescale, out[d][1] *= rescale;
                of_powers[0] *= rescale;
            }
#pragma unroll
            for (int pair = 0; pair < TILES; pair += 2) {  // of tiles: 16 positions are an instruction's
                u32 powers[2] = {}, v[2][8];
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    int tile = min(pair + t, TILES - 1), mine = begin(tile) + lane() % 4 * 2;
                    load_values(v[t], stage + UNIT / 2, row(tile), first + row(tile));
                    if (pair + t == TILES) break;
                    float x = mine < n ? power_of_2(score[tile].x - peak) : 0, y = mine + 1 < n ? power_of_2(score[tile].y - peak) : 0;
                    sum += x + y;
                    if (BYTES_CACHED) {  // scales of positions that are not there may be anything
                        float2 by = *(const float2*)(stage + UNIT + (POSITIONS + mine) * 4);
                        x = mine < n ? x * by.x : 0, y = mine + 1 < n ? y * by.y : 0;
                    }
                    powers[t] = pack_attended(x, y);
                }
                if (BYTES_CACHED) multiply_add<BYTES_CACHED>(of_powers, powers[0], 0, powers[1], 0, ATTENDED_ONES, ATTENDED_ONES);
#pragma unroll
                for (int d = 0; d < 8; d++) multiply_add<BYTES_CACHED>(out[d], powers[0], 0, powers[1], 0, v[0][d], v[1][d]);
            }
        }
        __syncwarp();
        if (lane() < ARRIVING_LANES) barrier_arrive(&place.shared.empty[(place.n_taken + taken) % STAGES], TEAMS);
    }
    place.n_taken += (length + POSITIONS - 1) / POSITIONS;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (BYTES_CACHED)
#pragma unroll
        for (int i = 0; i < 16; i++) out[i / 2][i % 2] -= RAISED * of_powers[0];
    if (lane() < 4) {
        float* to = place.partial + (i * WARPS + me) * 64;
#pragma unroll
        for (int d = 0; d < 8; d++) to[dimension_of(d, 0)] = out[d][0], to[dimension_of(d, 1)] = out[d][1];
        if (lane() == 0) place.shared.part_scale[i][me] = make_float2(peak, sum);
    }
}

// A row's output, of all warps' parts: 2 dimensions a lane, then 8 a packet.
__device__ __forceinline__ void combine_row(const Arguments& a, const Place& place, int i, bool running) {
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
    float share = running ? 1 / total : 0;
    x = running ? x * share : 0, y = running ? y * share : 0;
    float4 v = make_float4(x, y, __shfl_down_sync(~0u, x, 1), __shfl_down_sync(~0u, y, 1));
    int source = lane() * 2 % 32;  // lane l < 16 gets 4 dimensions, 4 l ...
    v = make_float4(__shfl_sync(~0u, v.x, source), __shfl_sync(~0u, v.y, source), __shfl_sync(~0u, v.z, source),
                    __shfl_sync(~0u, v.w, source));
    int column = blockIdx.x / 8 * 64 + lane() / 2 % 8 * 8;
    publish_halves(a.attended + ((size_t)row_of(a, i) * W + column) * 2, v, place.turn);
}

__device__ __forceinline__ void attend(const Arguments& a, Place& place, int layer) {
    fetch_newest(a, place, layer);
    if (thread() == 0) place.shared.attending = 1;
    u32 first_stage = place.n_taken;
#pragma unroll 1
    for (int i = 0; i < SHARE; i++) {
        const RowState& row = place.shared.rows[row_of(a, i)];
        if (row.running) attend_row(place, i, row.length, (place.n_taken - first_stage) % TEAMS);
    }
    sync();
    if (thread() == 0) place.shared.attending = 0;
    if (warp() < SHARE) combine_row(a, place, warp(), place.shared.rows[row_of(a, warp())].running);
}

// ---- a step ----

__device__ __forceinline__ void embed(const Arguments& a, Place& place) {
    place.x_turn++;
    for_each_half<1, B>(0, [&](int, int row, int half) {
        float x[4];
        embedding(x, a.embedding, a.positions, place.shared.rows[row], blockIdx.x * 8 + half * 4);
        add_to_residual(place, a.x, make_float4(x[0], x[1], x[2], x[3]), row, half, place.x_turn, true);
    });
}

// 4 blocks make 32 columns of the MLP's output: block % 4 = s has the sums of piece s of k, and adds up unit s.
__device__ __forceinline__ u8* sums_at(const Arguments& a, int block, int source, int row, int half) {
    return a.exchange + (((size_t)block * 4 + source) * 2 * B + row * 2 + half) * 16;
}

__device__ __forceinline__ void collect_sums(const Arguments& a, Place& place, int unit) {
    for_each_half<1, B>(0, [&](int, int row, int half) {
        int mine = blockIdx.x % 4;
        float4 v = total_of(place, mine, row, half);
        uint4 packets[3];
        await(
            packets, [&](int i) { return sums_at(a, blockIdx.x, i + (i >= mine), row, half); },
            [&](const uint4& packet) { return is_of(packet, place.turn); });
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 3; i++)
            v.x += __uint_as_float(packets[i].x), v.y += __uint_as_float(packets[i].y),
                v.z += __uint_as_float(packets[i].z), v.w += __uint_as_float(packets[i].w);
        add_to_residual(place, a.x, scaled(place, v, unit, half), row, half, place.x_turn);
    });
}

__device__ __forceinline__ void layer_step(const Arguments& a, Place& place, int layer) {
    int probed = lane() / 4 % 2 * (PART - 1), part = lane() % 4;  // what to probe: the first part's first and last row
    int piece = blockIdx.x % 4, first_unit = layer * LAYER_UNITS;
    place.turn++;
    phase<3, true>(place, a.x, W, place.x_turn, probed, part, [&](int which, int row, int half) {
        publish_halves(a.qkv + ((size_t)(which * B + row) * W + blockIdx.x * 8) * 2,
                       normed_total_of(place, first_unit, which, row, half), place.turn);
    });
    attend(a, place, layer);
    int of_rank = a.order[lane() % 8 * SHARE + SHARE - 1];  // the row that each of a head's blocks attends to last
    phase<1, false>(place, a.attended, W, place.turn, of_rank, 0, [&](int, int row, int half) {
        float4 v = scaled(place, total_of(place, 0, row, half), first_unit + OUT_UNIT, half);
        add_to_residual(place, a.middle, v, row, half, place.turn);
    });
    phase<4, true, UP_DELAY>(place, a.middle, W, place.turn, probed, part, [&](int unit, int row, int half) {
        float4 v = normed_total_of(place, first_unit + UP_UNIT, unit, row, half);
        publish_halves(a.hidden + ((size_t)row * (4 * W) + blockIdx.x * 32 + unit * 8) * 2,
                       make_float4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w)), place.turn);
    });
    phase<4, false>(place, a.hidden + piece * W * 2, 4 * W, place.turn, probed, part, [&](int unit, int row, int half) {
        if (unit == piece) return;
        float4 v = total_of(place, unit, row, half);
        publish(sums_at(a, blockIdx.x - piece + unit, piece, row, half), as_words(v.x, v.y, v.z, v.w), place.turn & 1);
    });
    place.x_turn++;
    collect_sums(a, place, first_unit + DOWN_UNIT);  // all 4 pieces of k have one scale
}

// This block's share of each row's logits, of the codebook at which the row stands.
__device__ __forceinline__ void head_step(const Arguments& a, Place& place, int step) {
#pragma unroll 1
    for (int book = 0; book < N_BOOKS; book++) {
        if (a.one_book && book != book_of(a, 0, step)) continue;
#pragma unroll 1
        for (int unit = 0; unit < HEAD_UNITS; unit += HEAD_GROUP)
            phase<HEAD_GROUP, true>(place, a.x, W, place.x_turn, 0, lane() % 4, [&](int i, int row, int half) {
                int first_unit = N_LAYERS * LAYER_UNITS + book * HEAD_UNITS + unit;
                float4 v = normed_total_of(place, first_unit, i, row, half);
                int column = (blockIdx.x * HEAD_UNITS + unit + i) * 8 + half * 4;
                if (book == book_of(a, row, step)) *(float4*)(a.logits + (size_t)row * PADDED + column) = v;
            });
    }
}

// The smallest logit of a row that top-p and top-k keep, as `ordered` has it.
__device__ __noinline__ u32 least_kept(const float* logits, const Row& row, float* scratch) {
    constexpr int EACH = (BOOK_SIZE + THREADS - 1) / THREADS;
    float x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int index = thread() + i * THREADS;
        x[i] = index < BOOK_SIZE ? __ldcg(logits + index) : NEVER;
    }
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
            int token = min(best.index, BOOK_SIZE - 1);  // if no logit is a number, a token all the same
            if (!ended) a.tokens[b * BLOCK_SIZE + state.n_drawn] = token;
            publish_numbered(a.drawn + b * 16, token, ended, shared.is_halted, step + 1);
        }
    }
    sync();
}

// All rows' tokens: each of the first blocks draws a row's, and every block hears of all.
__device__ __forceinline__ void draw_step(const Arguments& a, Shared& shared, int step) {
    if (blockIdx.x < B) {
        u32 seen, patience = PATIENCE;
        do {
            seen = step + 1;
            if (thread() < BLOCKS)
                asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                             : "=r"(seen)
                             : "l"(a.logits_ready + thread())
                             : "memory");
            if (--patience == 0) __trap();
        } while (seen != step + 1);
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
        if (packet[0].z) shared.halting = 1;
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
        int first = 0;  // row that runs: one block looks, for that holds the others up
        while (first < B - 1 && !shared.rows[first].running) first++;
        bool halted = blockIdx.x == first % BLOCKS && lane() == 0 && is_halted(a.halted, a.launch);
#pragma unroll 1
        for (int i = lane(); i < B * HEAD_UNITS; i += 32) {
            int b = i / HEAD_UNITS, unit = blockIdx.x * HEAD_UNITS + i % HEAD_UNITS;
            const Row& row = a.rows[b];
            if (shared.rows[b].running && row.temperature != 0)
                gumbel_block(a.noise + (size_t)b * PADDED + unit * 8, row.seed, STAGE, row.position + step, unit);
        }
        if (lane() == 0) shared.is_halted = halted;
        sync_threads(2, THREADS + 32);  // noise ready
        if (step + 1 < a.n_steps) sync_threads(3, THREADS + 64);  // noise used, rows' states moved on
        if (shared.stop) return;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1) decode(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ Shared shared;
    if (thread() == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], WARPS * ARRIVING_LANES);
        barrier_init_fence();
        shared.stop = 0, shared.halting = 0, shared.attending = 0;
    }
    if (thread() < B) {
        const Row& row = a.rows[thread()];
        shared.rows[thread()] = {row.length, {row.ids[0], row.ids[1]}, 0, row.n_tokens > 0, 0};
    }
    float* partial = (float*)(memory + STAGES * STAGE_BYTES);
    float* scales = partial + WARPS * 4 * B * 8;
    if (QUANTIZED)
        for (int i = thread(); i < ALL_UNITS * 8; i += THREADS + 64)
            scales[i] = a.scales[(size_t)blockIdx.x * ALL_UNITS * 8 + i];
    __syncthreads();
    if (warp() == WARPS) return copying_warp(a, shared, memory);
    if (warp() == WARPS + 1) return helping_warp(a, shared);
    Place place = {shared, memory, partial, scales, 0, 0, 0};
    for (int step = 0; step < a.n_steps; step++) {
        embed(a, place);
#pragma unroll 1
        for (int layer = 0; layer < N_LAYERS; layer++) layer_step(a, place, layer);
        head_step(a, place, step);
        sync_threads(2, THREADS + 32);  // the noise is ready
        sync();
        if (thread() == 0)
            asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.b32 [%0], %1;" ::"l"(a.logits_ready + blockIdx.x),
                         "r"(step + 1)
                         : "memory");
        draw_step(a, shared, step);
        bool running = false;
        for (int b = 0; b < B; b++) running |= shared.rows[b].running != 0;
        running &= !shared.halting;
        if (!running && thread() == 0) shared.stop = 1;
        if (step + 1 < a.n_steps) sync_threads(3, THREADS + 64);
        if (!running) break;
    }
    if (blockIdx.x == 0 && thread() < B) {
        a.result[thread() * 2] = shared.rows[thread()].n_drawn;
        a.result[thread() * 2 + 1] = shared.rows[thread()].ended;
    }
}
