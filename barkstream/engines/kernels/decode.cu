// n decode steps of a causal GPT for 1 to 8 rows in one launch: one block per multiprocessor, all of them working on
// every matrix. docs/performance.md has the measurements behind each choice.
//
// A step is a chain of small matrix products, far too short for kernel launches or grid barriers between them, while
// 600 MB of weights must come from memory. So:
// - Weights stream. Each block owns a fixed share of every matrix, stored in the order of use. One warp copies it into
//   shared memory, which holds a layer's share of it (3 stages), whatever the other warps wait for.
// - Blocks exchange activations as packets of 16 bytes, written and read at once, whose lowest bit says which layer
//   they belong to: an even or an odd one. The reader polls the packet itself, so an exchange costs one store and one load,
//   and no barrier. A packet is only overwritten after an exchange in which everybody has seen everybody, so one buffer
//   and one bit are enough.
// - A packet is 8 columns of a row as the tensor cores want them, so a warp polls straight into registers what its
//   slice of k needs. What everybody reads is written COPIES times: 128 readers of one line of L2 would wait for each other.
// - Polls hold up what they are after. So warps let a while pass before they look, and read neighbouring slices of k: whole lines.
// - Products are split over k by warp. Tensor cores take up to 8 rows at the price of one.
// - Nothing spills: a reload from local memory waits in line behind the other warps' polls. Hence 8 warps only, and
//   `thread()` and `lane()`, which the compiler must read again where it wants them.
//
// Exchanges of a layer, for block b = 8 * head + rank:
// - q, k, v of the head: 24 rows a block, to the head's 8 blocks
// - attention: positions are dealt to the head's blocks in chunks of 8; each block then combines 8 of the 64 dimensions
// - attention output: 8 dimensions a block, to all
//   (With one row these two are one: every block reads what each of a head's blocks has found, and the tensor cores,
//   which take 8 rows at the price of one, multiply all 8; their products are weighed and added.)
// - x after attention: 8 columns a block, to all
// - hidden layer of the MLP: 32 a block, to all
// - x after the MLP: 8 columns a block, to all
// Layer norm: its weights, and the subtraction of the mean, are folded into the matrices behind it, so products are
// taken of plain x; 1 / standard deviation is computed beside them and scales the sums.
#include "decode.cuh"

constexpr int TILE = 2 * UNIT;  // the tensor cores' left operand: two units
constexpr int STAGES = 3, STAGE_TILES = 2, STAGE_UNITS = 4;
constexpr int TILE_CHUNKS = BITS / 2, CHUNK = TILE / TILE_CHUNKS, STAGE_CHUNKS = STAGE_TILES * TILE_CHUNKS;  // 4 KB (large)
constexpr int IN_FLIGHT = QUANTIZED ? 3 : B == 1 ? 6 : 4;  // chunks of a block that are on their way
constexpr int HEAD_STAGES = (HEAD_TILES + STAGE_TILES - 1) / STAGE_TILES, HEAD_ROWS = HEAD_TILES * 16;
constexpr int HEAD_CYCLES = (HEAD_STAGES + STAGES - 1) / STAGES;  // a cycle fills every stage once; a layer is one
constexpr int SPLIT = WARPS / B;  // warps that share a row's attention
constexpr int COPIES = 8;
constexpr int KEY_CHUNKS = BLOCK_SIZE / 64;  // of 8 positions, that a block's share of a row's cache has at most
// Cycles between what a block says and its first look for what the others say.
constexpr int X_DELAY = B > 1 ? 400 : QUANTIZED ? 300 : 600, QUERY_DELAY = B > 1 ? 0 : 600, PART_DELAY = QUANTIZED ? 1400 : 2000,
              HIDDEN_DELAY = B > 1 || QUANTIZED ? 600 : 900;
static_assert(B <= 8 && (B & (B - 1)) == 0 && N_LAYERS % 2 == 0 && LAYER_UNITS == STAGES * STAGE_UNITS);

// Where the packets of 16 bytes lie.
constexpr bool SPREAD = B == 1;  // all blocks read what each of a head's blocks has found, see above
constexpr int PART_PACKETS = SPREAD ? COPIES * BLOCKS * 8 : BLOCKS * B * 17;
constexpr int QKV_AT = 0, PART_AT = QKV_AT + COPIES * H * B * 24, OUT_AT = PART_AT + PART_PACKETS,
              X1_AT = OUT_AT + COPIES * B * W / 8, X2_AT = X1_AT + COPIES * B * W / 8,
              HIDDEN_AT = X2_AT + COPIES * B * W / 8, CANDIDATE_AT = HIDDEN_AT + COPIES * B * W / 2,
              LOGITS_AT = CANDIDATE_AT + COPIES * BLOCKS * B * 2;

struct Arguments {
    const u8* weights;       // [BLOCKS][ALL_UNITS][UNIT]
    const u16* embedding;    // [ids][W], bf16
    const float* positions;  // [BLOCK_SIZE][W]
    const float* scales;     // [BLOCKS][ALL_UNITS][8], of quantized weights
    u8* cache;               // see cache.cuh
    float* cache_scales;
    u8* packets;
    int* tokens;    // [B][BLOCK_SIZE]: vocabulary indices within the book
    int* result;    // [B][2]: how many tokens, and why no more: 0 (all that were wanted), ENDED or HALTED
    float* logits;  // [B][BOOK_SIZE] of the last step, for tests; may be null
    const u64* halted;  // the host's, see `is_halted`
    int n_slots, n_steps;
    u64 launch;  // its number
    u32 number;    // of the first step; each step has its own
    int filter;    // some row asks for top-k or top-p
    int one_book;  // all rows stand at the same codebook, so the others need not be computed
    Row rows[B];
};

struct Shared {
    u64 full[STAGES], empty[STAGES], landed[IN_FLIGHT];
    float2 moments[2][WARPS][B];   // of a warp's slice of x: sum, and sum of squares
    float2 residual[B][4];         // this block's 8 columns of x, in full precision
    // attention: peak and sum of a warp's positions, and of a row's newest one, which for the next layer is noted while some still read
    float2 part_scale[WARPS + 2 * B];
    __align__(16) float part[WARPS + 2 * B][64];
    float noise[B][HEAD_ROWS], logits[B][HEAD_ROWS];
    float scratch[WARPS];
    RowState rows[B];
    volatile int stop;  // for the copying warp, which looks now and then
    int halting;  // the host wants no further step: block 0's is what counts
};

__device__ __forceinline__ u8* at(const Arguments& a, int packet) { return a.packets + packet * 16; }

__device__ __forceinline__ int book_of(const Arguments& a, int row, int step) {
    return (a.rows[row].position + step) % N_BOOKS;
}

// ---- the copying warp ----

__device__ __forceinline__ bool passed(u64* barrier, u32 parity) {
    u32 ready;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ready)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return ready;
}

// Copies in chunks, only IN_FLIGHT of them on their way at once: enough to keep memory busy, and no more, because polls
// and packets wait behind what is on its way (with 144 KB a block in flight an exchange took 10,000 cycles instead of
// 1,400).
struct Copier {
    Shared& shared;
    u8* stages;
    int n_issued, n_landed, n_filled;  // chunks, chunks, stages

    // Waits for the oldest chunk on its way, and tells the others when it was its stage's last.
    __device__ void land() {
        barrier_wait(&shared.landed[n_landed % IN_FLIGHT], n_landed / IN_FLIGHT & 1);
        if (++n_landed % STAGE_CHUNKS == 0) barrier_arrive(&shared.full[(n_landed / STAGE_CHUNKS - 1) % STAGES]);
    }
    // Fills every stage once with n_tiles tiles, nothing where there are none; false if the block is told to stop.
    __device__ bool fill(const u8* from, int n_tiles) {
        for (int stage = 0; stage < STAGES; stage++, n_filled++) {
            if (!passed(&shared.empty[stage], (n_filled / STAGES & 1) ^ 1)) {
                while (n_landed < n_issued) land();
                while (!passed(&shared.empty[stage], (n_filled / STAGES & 1) ^ 1))
                    if (shared.stop) return false;
            }
            for (int i = stage * STAGE_CHUNKS; i < (stage + 1) * STAGE_CHUNKS; i++, n_issued++) {
                if (n_issued - n_landed == IN_FLIGHT) land();
                u64* landed = &shared.landed[n_issued % IN_FLIGHT];
                bool there = i < n_tiles * TILE_CHUNKS;
                barrier_expect(landed, there ? CHUNK : 0);
                if (there) copy_once_to_shared(stages + i * CHUNK, from + i * CHUNK, CHUNK, landed);
            }
        }
        return true;
    }
};

// Brings the keys and values that this block will read in a layer into L2.
__device__ void prefetch_cache(const Arguments& a, int layer, int step) {
    int head = blockIdx.x / 8, rank = blockIdx.x % 8;
    for (int b = 0; b < B; b++) {
        int length = min(a.rows[b].length + step, BLOCK_SIZE);
        for (int kind = 0; kind < 2; kind++) {
            size_t at = ((((size_t)layer * 2 + kind) * a.n_slots + a.rows[b].slot) * H + head) * BLOCK_SIZE;
            for (int i = lane();; i += 32) {
                int p = ((i / 8) * 8 + rank) * 8 + i % 8;
                if (p >= length) break;
                if (!BYTES_CACHED || i % 2 == 0) prefetch_l2(a.cache + (at + p) * CACHED);
                if (BYTES_CACHED && i % 8 == 0) prefetch_l2(a.cache_scales + at + p);
            }
        }
    }
}

__device__ void copy_steps(const Arguments& a, Copier& copier) {
    const u8* mine = a.weights + (size_t)blockIdx.x * ALL_UNITS * UNIT;
    for (int step = 0; step < a.n_steps; step++) {
        for (int layer = 0; layer < N_LAYERS; layer++) {
            prefetch_cache(a, layer, step);
            bool go = true;
            if (lane() == 0) go = copier.fill(mine + layer * (STAGES * STAGE_TILES * TILE), STAGES * STAGE_TILES);
            if (!__shfl_sync(~0u, go, 0)) return;
        }
        for (int book = 0; book < N_BOOKS; book++) {
            if (a.one_book && book != book_of(a, 0, step)) continue;
            bool go = true;
            for (int i = 0; i < HEAD_CYCLES && go; i++) {
                int first = i * STAGES * STAGE_TILES;
                if (lane() == 0)
                    go =
                        copier.fill(mine + (size_t)(N_LAYERS * STAGES * STAGE_TILES + book * HEAD_TILES + first) * TILE,
                                    HEAD_TILES - first);
            }
            if (!__shfl_sync(~0u, go, 0)) return;
        }
    }
}

__device__ void copying_warp(const Arguments& a, Shared& shared, u8* stages) {
    Copier copier = {shared, stages, 0, 0, 0};
    copy_steps(a, copier);
    if (lane() == 0)
        while (copier.n_landed < copier.n_issued)
            copier.land();  // also those that nobody will use must land before the block ends
}

// ---- the 8 computing warps ----

// What a warp carries from phase to phase.
struct Place {
    Shared& shared;
    const u8* stages;
    float* partial;       // [2][WARPS][units][B][8]
    const float* scales;  // [ALL_UNITS][8]: this block's
    int cycle;            // of the stages
    int buffer;           // of the partial sums
};

__device__ __forceinline__ u8* copy_at(const Arguments& a, int from,
                                       int words_per_row) {  // where this block reads what everybody reads
    return at(a, from + blockIdx.x % COPIES * (B * words_per_row / 4));
}

// This warp's slices of a tile: 8 of k a lane, of either unit. A slice that doesn't exist is read as the last one and then 0: loads
// in branches would wait for one another.
__device__ __forceinline__ void load_tile(uint4 (&weights)[2 * PAIRS], const Place& place, int tile) {
    const u8* first = place.stages + tile * TILE + (slice_of(0) * 32 + lane()) * WEIGHT_BYTES;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        int further = EVEN ? i / 2 : min(i / 2 * WARPS, SLICES - 1 - warp());
        weights[i] = weights_at(first + i % 2 * UNIT, further * 32);
        if (!EVEN && slice_of(i / 2) >= SLICES) weights[i] = make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void wait_for_stage(const Place& place, int stage) {
    barrier_wait(&place.shared.full[stage], place.cycle & 1);
}
__device__ __forceinline__ void release_stage(const Place& place, int stage) {
    __syncwarp();
    if (lane() < ARRIVING_LANES) barrier_arrive(&place.shared.empty[stage]);
}

// All weights of a stage, which is free for the next ones from then on.
__device__ __forceinline__ void take_stage(uint4 (&weights)[STAGE_TILES][2 * PAIRS], const Place& place, int stage) {
    wait_for_stage(place, stage);
#pragma unroll
    for (int m = 0; m < STAGE_TILES; m++) load_tile(weights[m], place, stage * STAGE_TILES + m);
    release_stage(place, stage);
}

// sums of 16 rows of weights [16 x 8 rows of activations]: sums[0], [1] of the first unit, [2], [3] of the second
__device__ __forceinline__ void multiply(float (&sums)[4], const uint4 (&weights)[2 * PAIRS],
                                         const uint4 (&act)[PAIRS]) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const uint4 &first = weights[2 * i], &second = weights[2 * i + 1];
        multiply_add<QUANTIZED>(sums, first.x, second.x, first.y, second.y, act[i].x, act[i].y);
        multiply_add<QUANTIZED>(sums, first.z, second.z, first.w, second.w, act[i].z, act[i].w);
    }
}

// Activations of this warp's slices, N_CHUNKS times W of k: packets of everybody, from `from` on.
template <int N_CHUNKS>
__device__ __forceinline__ void await_slices(uint4 (&act)[N_CHUNKS][PAIRS], const u8* from, u32 odd) {
    constexpr int PACKETS_PER_ROW = N_CHUNKS * W / 8;
    const u8* mine = from + (lane() / 4 % B * PACKETS_PER_ROW + lane() % 4) *
                                16;  // rows beyond B repeat others; nobody reads their sums
    // A slice that doesn't exist is polled, too, as the last one; its weights are 0.
    auto slice = [&](int i) { return min(slice_of(i), SLICES - 1); };
    uint4 v[N_CHUNKS * PAIRS];
    let_pass<N_CHUNKS == 1 ? X_DELAY : HIDDEN_DELAY>();
    await(
        v, [&](int i) { return mine + (i / PAIRS * (W / 8) + slice(i % PAIRS) * 4) * 16; },
        [&](const uint4& packet) { return (packet.x & 1) == odd; });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N_CHUNKS * PAIRS; i++) act[i / PAIRS][i % PAIRS] = v[i];
}

// Sums and sums of squares of this warp's slices of x, by tensor cores: x times x above, of which the diagonal counts, and ones times x
// below.
__device__ __forceinline__ void note_moments(const uint4 (&act)[PAIRS], const Place& place) {
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        if (!EVEN && slice_of(i) >= SLICES) break;
        multiply_add<QUANTIZED>(sums, act[i].x, ONES, act[i].y, ONES, act[i].x, act[i].y);
        multiply_add<QUANTIZED>(sums, act[i].z, ONES, act[i].w, ONES, act[i].z, act[i].w);
    }
    float2* to = place.shared.moments[place.buffer][warp()];
    int row = lane() / 4, column = lane() % 4 * 2;
    if (row < B && column == (row & ~1)) to[row].y = row % 2 ? sums[1] : sums[0];
    if (row == 0 && column < B) to[column].x = sums[2];
    if (row == 0 && column + 1 < B) to[column + 1].x = sums[3];
}

// Of what each warp noted. Every lane adds for itself: shuffles take longer than loads, each of which a warp's lanes share.
template <class Noted>
__device__ __forceinline__ float2 sum_of_warps(Noted noted) {
    float2 v[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) v[w] = noted(w);
#pragma unroll
    for (int step = WARPS / 2; step; step /= 2)
#pragma unroll
        for (int w = 0; w < step; w++) v[w] = make_float2(v[w].x + v[w + step].x, v[w].y + v[w + step].y);
    return v[0];
}

// 1 / standard deviation of a row of x, found by a warp
__device__ __forceinline__ float scale_of(const Place& place, int row) {
    float2 m = sum_of_warps([&](int w) { return place.shared.moments[place.buffer][w][row]; });
    float mean = m.x / W;
    return rsqrtf(fmaxf(m.y / W - mean * mean, 0) + 1e-5f);
}

// One warp's sums into shared memory: N units, the first of which is half FIRST of tile 0.
template <int FIRST, int N, int N_TILES>
__device__ __forceinline__ void note_sums(const float (&sums)[N_TILES][4], const Place& place) {
    float* to = place.partial + (place.buffer * WARPS + warp()) * (STAGE_UNITS * B * 8) + lane() / 4;
    int row = lane() % 4 * 2;
#pragma unroll
    for (int u = 0; u < N; u++) {
        int half = FIRST + u;
        if (row < B) to[(u * B + row) * 8] = sums[half / 2][half % 2 * 2];
        if (row + 1 < B) to[(u * B + row + 1) * 8] = sums[half / 2][half % 2 * 2 + 1];
    }
}

// Columns 2 * (lane % 4), + 1 of item = unit * B + row, summed over warps by a warp.
__device__ __forceinline__ float2 total_of(int item, const Place& place) {
    const float* from = place.partial + place.buffer * WARPS * (STAGE_UNITS * B * 8) + item * 8 + lane() % 4 * 2;
    return sum_of_warps([&](int w) { return *(const float2*)(from + w * (STAGE_UNITS * B * 8)); });
}

// The same of a layer's unit, or of one of the head's, scaled as its weights are, and by `norm`.
__device__ __forceinline__ float2 total_of(int item, const Place& place, int unit, float norm = 1) {
    float2 v = total_of(item, place), scale = make_float2(1, 1);
    if (QUANTIZED) scale = *(const float2*)(place.scales + unit * 8 + lane() % 4 * 2);
    return make_float2(v.x * (scale.x * norm), v.y * (scale.y * norm));
}

// 8 columns of a row, 2 in each of 4 neighbouring lanes, as one packet, from `to` on: every group of 4 lanes writes one
// of the copies.
__device__ __forceinline__ void publish_columns(u8* to, int bytes_per_copy, float2 v, u32 odd) {
    static_assert(COPIES == 8);
    u32 word = pack_pair(v.x, v.y);
    int first = lane() & ~3;
    uint4 packet = make_uint4(__shfl_sync(~0u, word, first), __shfl_sync(~0u, word, first + 1),
                              __shfl_sync(~0u, word, first + 2), __shfl_sync(~0u, word, first + 3));
    if (lane() == first) publish(to + lane() / 4 * bytes_per_copy, packet, odd);
}

// x of this warp's slices, and of the block's own columns.
__device__ __forceinline__ void embed(uint4 (&act)[PAIRS], const Arguments& a, Shared& shared) {
    int row = lane() / 4 % B;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        float x[8];
        int slice = min(slice_of(i), SLICES - 1);
        embedding(x, a.embedding, a.positions, shared.rows[row], slice * 32 + lane() % 4 * 8);
        act[i] = pack(x);
    }
    if (warp() < B) {
        float x[2];
        embedding(x, a.embedding, a.positions, shared.rows[warp()], blockIdx.x * 8 + lane() % 4 * 2);
        shared.residual[warp()][lane() % 4] = make_float2(x[0], x[1]);
    }
}

// ---- attention ----

// Attention by tensor cores: lane 4 g + t has 16 dimensions, of the t-th two eights below, of positions g and g + 8.
__device__ __forceinline__ int eight_of(int half) { return BYTES_CACHED ? lane() % 4 * 2 + half : lane() % 4 + half * 4; }

// A lane's 16 dimensions of a position's keys, or values, and what they are to be multiplied by. Zeros of one that is not there.
struct Cached {
    uint4 words[BYTES_CACHED ? 1 : 2];
    float scale;

    __device__ __forceinline__ void fetch(const Arguments& a, size_t head, int position, bool there) {
#pragma unroll
        for (int half = 0; half < (BYTES_CACHED ? 1 : 2); half++)
            words[half] = load_cached_l2(a.cache + head * CACHED + cached_at(position, eight_of(half)), there);
        scale = BYTES_CACHED ? load_cached_l2_4(a.cache_scales + head + position, there) : 1;
    }
    __device__ __forceinline__ void pairs(u32 (&v)[8]) const {
        const uint4& last = words[BYTES_CACHED ? 0 : 1];
        uint4 low = BYTES_CACHED ? as_pairs(make_uint2(words[0].x, words[0].y)) : words[0],
              high = BYTES_CACHED ? as_pairs(make_uint2(last.z, last.w)) : last;
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};

// This lane's 8 dimensions of a position into the cache, if it is one of the first 8; all lanes call it.
__device__ __forceinline__ void cache_eight(const Arguments& a, size_t head, int position, const float (&v)[8]) {
    u8* to = a.cache + head * CACHED + cached_at(position, lane() % 8);
    if (BYTES_CACHED) {
        float scale = scale_of_eights(v);
        if (lane() < 8) *(uint2*)to = as_bytes(v, scale);
        if (lane() == 0) a.cache_scales[head + position] = scale;
    } else if (lane() < 8) {
        *(uint4*)to = pack(v);
    }
}

// N eights, at eight(i), of the query (which = 0), the new key (1) or the new value (2) of this block's head.
template <int N, class Eight>
__device__ __forceinline__ void receive(uint4 (&packets)[N], const Arguments& a, int b, int which, u32 odd, Eight eight) {
    const u8* from = at(a, QKV_AT + ((blockIdx.x % COPIES * H + blockIdx.x / 8) * B + b) * 24 + which * 8);
    await(
        packets, [&](int i) { return from + eight(i) * 16; }, [&](const uint4& packet) { return (packet.x & 1) == odd; });
    __syncwarp();
}

__device__ __forceinline__ int newest_part(int row, u32 odd) { return WARPS + (int)odd * B + row; }

// The helping warp's part: the positions being fed, if they are this block's. They go into the cache, too.
__device__ __forceinline__ void attend_newest(const Arguments& a, Shared& shared, int layer, u32 odd) {
    for (int b = 0; b < B; b++) {
        int length = shared.rows[b].length;
        float score = -1e30f, sum = 0, v[8] = {};
        if (length / 8 % 8 == blockIdx.x % 8) {
            uint4 packets[3];
            receive(packets, a, b, 0, odd, [&](int i) { return i * 8 + lane() % 8; });
            float q[8], k[8];
            unpack(q, packets[0]), unpack(k, packets[1]), unpack(v, packets[2]);
            score = score_of(q, k), sum = 1;
            size_t keys = head_at(a, layer, b);
            cache_eight(a, keys, length, k), cache_eight(a, keys + values_after(a), length, v);
        }
        int part = newest_part(b, odd);
        if (lane() < 8) {
            *(float4*)&shared.part[part][lane() * 8] = make_float4(v[0], v[1], v[2], v[3]);
            *(float4*)&shared.part[part][lane() * 8 + 4] = make_float4(v[4], v[5], v[6], v[7]);
        }
        if (lane() == 0) shared.part_scale[part] = make_float2(score, sum);
    }
    sync_threads(4, THREADS + 32);
}

// A row's warps and its newest position together, for the head's other blocks, or for all blocks if it is the only row: 8 dimensions
// a lane, a quarter of the parts each, and then all have all.
__device__ __forceinline__ void share_attention(const Arguments& a, const Shared& shared, u32 odd) {
    constexpr int EACH = (SPLIT + 3) / 4;
    int row = warp(), eight = lane() % 8, quarter = lane() / 8;
    auto part_of = [&](int i) { return i < SPLIT ? i * B + row : newest_part(row, odd); };
    float2 scale[SPLIT + 1];
    float top = -1e30f, total = 0, x[8] = {};
#pragma unroll
    for (int i = 0; i <= SPLIT; i++) scale[i] = shared.part_scale[part_of(i)], top = fmaxf(top, scale[i].x);
#pragma unroll
    for (int i = 0; i <= SPLIT; i++) total = fmaf(power_of_2(scale[i].x - top), scale[i].y, total);
#pragma unroll
    for (int j = 0; j <= EACH; j++) {  // the last time all add the newest position, or nothing
        int part = j < EACH ? quarter * EACH + j : SPLIT;
        bool mine = j < EACH ? part < SPLIT : quarter == 0;
        const float* from = shared.part[part_of(min(part, SPLIT))] + eight * 8;
        float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
        float weight = mine ? power_of_2(shared.part_scale[part_of(min(part, SPLIT))].x - top) : 0;
        x[0] = fmaf(weight, low.x, x[0]), x[1] = fmaf(weight, low.y, x[1]), x[2] = fmaf(weight, low.z, x[2]),
        x[3] = fmaf(weight, low.w, x[3]), x[4] = fmaf(weight, high.x, x[4]), x[5] = fmaf(weight, high.y, x[5]),
        x[6] = fmaf(weight, high.z, x[6]), x[7] = fmaf(weight, high.w, x[7]);
    }
    __syncwarp();
#pragma unroll
    for (int offset = 8; offset < 32; offset *= 2)
#pragma unroll
        for (int d = 0; d < 8; d++) x[d] += __shfl_xor_sync(~0u, x[d], offset);
    if constexpr (SPREAD) {
        uint4 packet = pack(x);
#pragma unroll
        for (int copy = 0; copy < COPIES; copy += 4)
            publish(at(a, PART_AT + ((copy + quarter) * BLOCKS + blockIdx.x) * 8 + eight), packet, odd);
        if (lane() < COPIES) publish(at(a, OUT_AT + lane() * BLOCKS + blockIdx.x), as_words(top, total, 0, 0), odd);
        return;
    }
    u8* to = at(a, PART_AT + (blockIdx.x * B + row) * 17);
    uint4 packet = quarter == 0 ? as_words(x[0], x[1], x[2], x[3]) : as_words(x[4], x[5], x[6], x[7]);
    if (quarter < 2) publish(to + (eight * 2 + quarter) * 16, packet, odd);
    if (lane() == 16) publish(to + 16 * 16, as_words(top, total, 0, 0), odd);
}

// This block's 8 dimensions, of the head's 8 blocks: lane = 4 * source + pair of dimensions.
__device__ __forceinline__ void combine_attention(const Arguments& a, u32 odd) {
    const u8* source = at(a, PART_AT + ((blockIdx.x / 8 * 8 + lane() / 4) * B + warp()) * 17);
    int mine = blockIdx.x % 8 * 2 + lane() / 2 % 2;
    uint4 packets[2];
    await(
        packets, [&](int i) { return source + (i ? 16 : mine) * 16; },
        [&](const uint4& packet) { return (packet.x & 1) == odd; });
    __syncwarp();
    float top = __uint_as_float(packets[1].x), all = top;
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, offset));
    float weight = power_of_2(top - all), total = weight * __uint_as_float(packets[1].y);
    float x = weight * __uint_as_float(lane() % 2 ? packets[0].z : packets[0].x),
          y = weight * __uint_as_float(lane() % 2 ? packets[0].w : packets[0].y);
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
        total += __shfl_xor_sync(~0u, total, offset);
        x += __shfl_xor_sync(~0u, x, offset);
        y += __shfl_xor_sync(~0u, y, offset);
    }
    float share = __fdividef(1, total);
    publish_columns(at(a, OUT_AT + warp() * (W / 8) + blockIdx.x), B * W * 2, make_float2(x * share, y * share), odd);
}

// The only row's attention output times a tile's second unit, over this warp's slices of k: what each of a head's 8
// blocks has found is one of the 8 rows that the tensor cores multiply, and then weighed.
__device__ __forceinline__ void multiply_attention(float (&sum)[1][4], const uint4 (&weights)[2 * PAIRS],
                                                   const Arguments& a, u32 odd) {
    static_assert(PAIRS <= 4, "a lane reads one scale");
    auto slice = [&](int i) { return min(slice_of(i), SLICES - 1); };
    const u8 *parts = at(a, PART_AT + (blockIdx.x % COPIES * BLOCKS + lane() / 4) * 8 + lane() % 4),
             *scales = at(a, OUT_AT + blockIdx.x % COPIES * BLOCKS + lane() % 8);
    uint4 v[PAIRS], scale[1];
    auto is_wanted = [&](const uint4& packet) { return (packet.x & 1) == odd; };
    let_pass<PART_DELAY>();
    // the scales first, which are sent last: the rest is most of what anybody polls
    await(scale, [&](int) { return scales + slice(min(lane() / 8, PAIRS - 1)) / 2 * 128; }, is_wanted);
    __syncwarp();
    await(v, [&](int i) { return parts + (slice(i) / 2 * 64 + slice(i) % 2 * 4) * 16; }, is_wanted);
    __syncwarp();
    float peak = __uint_as_float(scale[0].x), total = __uint_as_float(scale[0].y), sum_of_all = total;  // by this part's measure
#pragma unroll
    for (int other = 1; other < 8; other++)
        sum_of_all = fmaf(__shfl_xor_sync(~0u, total, other), power_of_2(__shfl_xor_sync(~0u, peak, other) - peak), sum_of_all);
    float share = sum_of_all < 1e38f ? __fdividef(1, sum_of_all) : 0, all = 0;  // nothing if it is by far the least
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const uint4 &first = weights[2 * i], &second = weights[2 * i + 1];
        float of[4] = {};
        multiply_add<QUANTIZED>(of, first.x, second.x, first.y, second.y, v[i].x, v[i].y);
        multiply_add<QUANTIZED>(of, first.z, second.z, first.w, second.w, v[i].z, v[i].w);
        int from = i * 8 + lane() % 4 * 2;
        all = fmaf(of[2], __shfl_sync(~0u, share, from), all);
        all = fmaf(of[3], __shfl_sync(~0u, share, from + 1), all);
    }
    all += __shfl_xor_sync(~0u, all, 1);
    sum[0][2] = all + __shfl_xor_sync(~0u, all, 2);
}

// Columns of a matrix [8 x 8], two to a word, in place of its rows.
__device__ __forceinline__ u32 transposed(u32 words) {
    u32 columns;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(words));
    return columns;
}

// The computing warps': this block's share of a row's earlier positions. It owns every eighth chunk of 8; a warp takes two at a time.
__device__ __forceinline__ void attend(const Arguments& a, Shared& shared, int layer, u32 odd) {
    int b = warp() % B, length = shared.rows[b].length;
    size_t keys = head_at(a, layer, b), values = keys + values_after(a);
    Cached key[2], value[2];
    auto position = [&](int chunk) { return (chunk * 8 + blockIdx.x % 8) * 8 + lane() / 4; };
    auto fetch = [&](int first) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int p = position(first + i * SPLIT);
            key[i].fetch(a, keys, p, p < length), value[i].fetch(a, values, p, p < length);
        }
    };
    fetch(warp() / B);
    uint4 q[2];
    let_pass<QUERY_DELAY>();
    receive(q, a, b, 0, odd, [&](int i) { return eight_of(i); });
#pragma unroll
    for (int i = 0; i < 2; i++)
        q[i] = make_uint4(as_attended(q[i].x), as_attended(q[i].y), as_attended(q[i].z), as_attended(q[i].w));
    float peak = -1e30f, sum = 0, out[8][4] = {};
#pragma unroll 1
    for (int first = warp() / B;;) {
        u32 k[2][8], v[2][8];
#pragma unroll
        for (int i = 0; i < 2; i++) key[i].pairs(k[i]), value[i].pairs(v[i]);
        float dots[2][4] = {};
        multiply_add<BYTES_CACHED>(dots[0], k[0][0], k[1][0], k[0][1], k[1][1], q[0].x, q[0].y);
        multiply_add<BYTES_CACHED>(dots[1], k[0][2], k[1][2], k[0][3], k[1][3], q[0].z, q[0].w);
        multiply_add<BYTES_CACHED>(dots[0], k[0][4], k[1][4], k[0][5], k[1][5], q[1].x, q[1].y);
        multiply_add<BYTES_CACHED>(dots[1], k[0][6], k[1][6], k[0][7], k[1][7], q[1].z, q[1].w);
        float score[2], weight[2], highest = peak;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            score[i] = (dots[0][2 * i] + dots[1][2 * i]) * (SCORE_SCALE * key[i].scale);
            if (position(first + i * SPLIT) >= length) score[i] = -1e30f;
            highest = fmaxf(highest, score[i]);
        }
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, offset));
        float rescale = power_of_2(peak - highest);
        peak = highest, sum *= rescale;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            weight[i] = position(first + i * SPLIT) < length ? power_of_2(score[i] - peak) : 0;
            sum += weight[i], weight[i] *= value[i].scale;
        }
        u32 weights[2];  // of positions 2 t, 2 t + 1 of each chunk
#pragma unroll
        for (int i = 0; i < 2; i++)
            weights[i] = pack_attended(__shfl_sync(~0u, weight[i], lane() % 4 * 8), __shfl_sync(~0u, weight[i], lane() % 4 * 8 + 4));
#pragma unroll
        for (int d = 0; d < 8; d++) {
            out[d][0] *= rescale, out[d][1] *= rescale;
            multiply_add<BYTES_CACHED>(out[d], weights[0], 0, weights[1], 0, transposed(v[0][d]), transposed(v[1][d]));
        }
        first += 2 * SPLIT;
        if (KEY_CHUNKS <= 2 * SPLIT || first >= KEY_CHUNKS || position(first) - lane() / 4 >= length) break;
        fetch(first);
    }
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane() < 4) {
#pragma unroll
        for (int d = 0; d < 8; d += 2)
            *(float4*)&shared.part[warp()][eight_of(d / 4) * 8 + d % 4 * 2] =
                make_float4(out[d][0], out[d][1], out[d + 1][0], out[d + 1][1]);
        if (lane() == 0) shared.part_scale[warp()] = make_float2(peak, sum);
    }
    sync_threads(4, THREADS + 32);
    if (warp() < B) {
        share_attention(a, shared, odd);
        if constexpr (!SPREAD) combine_attention(a, odd);
    }
}

// Row `warp`, columns 2 * (lane % 4), + 1: each group of 4 lanes does the same.
__device__ __forceinline__ float2 add_to_residual(Shared& shared, float2 v) {
    float2 x = shared.residual[warp()][lane() % 4];
    __syncwarp();
    x = make_float2(x.x + v.x, x.y + v.y);
    shared.residual[warp()][lane() % 4] = x;
    return x;
}

// Dealt to the computing warps.
template <int N, class Work>
__device__ __forceinline__ void for_each_item(Work work) {
    if constexpr (N <= WARPS) {  // no loop: what need not wait is not held up by what must
        if (warp() < N) work(warp());
    } else {
#pragma unroll 1
        for (int item = warp(); item < N; item += WARPS) work(item);
    }
}

// One layer. x of the first layer comes in `act`.
__device__ __forceinline__ void layer_step(const Arguments& a, Place& place, uint4 (&act)[1][PAIRS], int layer) {
    u32 odd = layer % 2 == 0;
    int first_unit = layer * LAYER_UNITS;
    uint4 weights[STAGE_TILES][2 * PAIRS];
    take_stage(weights, place, 0);  // queries and keys; values and the output projection
    if (layer) await_slices<1>(act, copy_at(a, X2_AT, W / 2), odd ^ 1);
    {
        float sums[2][4] = {};
        multiply(sums[0], weights[0], act[0]);
        multiply(sums[1], weights[1], act[0]);
        note_moments(act[0], place);
        note_sums<0, 3>(sums, place);
        sync();
        auto publish_item = [&](int item) {
            int row = item % B, unit = item / B;
            float2 v = total_of(item, place, first_unit + unit, scale_of(place, row));
            publish_columns(at(a, QKV_AT + (blockIdx.x / 8 * B + row) * 24 + unit * 8 + blockIdx.x % 8), H * B * 24 * 16, v, odd);
        };
        for_each_item<3 * B>(publish_item);
        place.buffer ^= 1;
    }
    attend(a, place.shared, layer, odd);
    {
        float sums[1][4] = {};
        if constexpr (SPREAD) {
            multiply_attention(sums, weights[1], a, odd);
        } else {
            await_slices<1>(act, copy_at(a, OUT_AT, W / 2), odd);
            multiply(sums[0], weights[1], act[0]);
        }
        note_sums<1, 1>(sums, place);
        sync();
        if (warp() < B) {
            float2 v = total_of(warp(), place, first_unit + OUT_UNIT);
            v = add_to_residual(place.shared, v);
            publish_columns(at(a, X1_AT + warp() * (W / 8) + blockIdx.x), B * W * 2, v, odd);
        }
        place.buffer ^= 1;
    }
    {
        take_stage(weights, place, 1);
        float sums[2][4] = {};
        await_slices<1>(act, copy_at(a, X1_AT, W / 2), odd);
        multiply(sums[0], weights[0], act[0]);
        multiply(sums[1], weights[1], act[0]);
        note_moments(act[0], place);
        note_sums<0, 4>(sums, place);
        sync();
        auto publish_item = [&](int item) {
            int row = item % B, unit = item / B;
            float2 v = total_of(item, place, first_unit + UP_UNIT + unit, scale_of(place, row));
            v = make_float2(gelu(v.x), gelu(v.y));
            publish_columns(at(a, HIDDEN_AT + row * (W / 2) + blockIdx.x * 4 + unit), B * W * 8, v, odd);
        };
        for_each_item<4 * B>(publish_item);
        place.buffer ^= 1;
    }
    {
        wait_for_stage(place, 2);  // the 4 units are 4 pieces of k of the same 8 rows
        load_tile(weights[0], place, 2 * STAGE_TILES);
        float sums[4][4] = {}, all[1][4];
        uint4 hidden[4][PAIRS];
        await_slices<4>(hidden, copy_at(a, HIDDEN_AT, 2 * W), odd);
        multiply(sums[0], weights[0], hidden[0]);
        multiply(sums[1], weights[0], hidden[1]);
        load_tile(weights[1], place, 2 * STAGE_TILES + 1);  // not before: registers are full
        release_stage(place, 2);
        multiply(sums[2], weights[1], hidden[2]);
        multiply(sums[3], weights[1], hidden[3]);
        for (int j = 0; j < 2; j++) all[0][j] = (sums[0][j] + sums[1][j + 2]) + (sums[2][j] + sums[3][j + 2]);
        note_sums<0, 1>(all, place);
        sync();
        if (warp() < B) {
            float2 v = total_of(warp(), place, first_unit + DOWN_UNIT);  // all 4 pieces of k have one scale
            v = add_to_residual(place.shared, v);
            publish_columns(at(a, X2_AT + warp() * (W / 8) + blockIdx.x), B * W * 2, v, odd);
        }
        place.buffer ^= 1;
    }
    place.cycle++;
}

__device__ __forceinline__ void note_logit(const Arguments& a, Shared& shared, int row, int local, float logit,
                                           u32 number) {
    int index = blockIdx.x * HEAD_ROWS + local;
    shared.logits[row][local] = index < BOOK_SIZE ? logit : NEVER;
    if (a.filter)
        asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(
                         at(a, LOGITS_AT) + (size_t)(row * BLOCKS * HEAD_ROWS + index) * 8),
                     "r"(__float_as_uint(shared.logits[row][local])), "r"(number)
                     : "memory");
    if (a.logits && index < BOOK_SIZE) a.logits[row * BOOK_SIZE + index] = logit;
}

// Logits of this block's share of each row's vocabulary, into shared memory.
__device__ __forceinline__ void head_step(const Arguments& a, Place& place, int step, u32 number) {
    uint4 act[1][PAIRS], weights[STAGE_TILES][2 * PAIRS];
    await_slices<1>(act, copy_at(a, X2_AT, W / 2), 0);
#pragma unroll 1
    for (int book = 0; book < N_BOOKS; book++) {
        if (a.one_book && book != book_of(a, 0, step)) continue;
#pragma unroll 1
        for (int i = 0; i < HEAD_CYCLES * STAGES; i++) {
            if (i < HEAD_STAGES) {
                take_stage(weights, place, i % STAGES);
            } else {
                wait_for_stage(place, i % STAGES);
                release_stage(place, i % STAGES);
            }
            if (i % STAGES == STAGES - 1) place.cycle++;
            if (i >= HEAD_STAGES) continue;
            float sums[2][4] = {};
            multiply(sums[0], weights[0], act[0]);
            multiply(sums[1], weights[1], act[0]);
            note_moments(act[0], place);
            note_sums<0, 4>(sums, place);
            sync();
#pragma unroll 1
            for (int item = warp(); item < 4 * B; item += WARPS) {
                int row = item % B, local = (i * STAGE_UNITS + item / B) * 8 + lane() % 4 * 2;
                int unit = N_LAYERS * LAYER_UNITS + book * HEAD_UNITS + min(i * STAGE_UNITS + item / B, HEAD_UNITS - 1);
                float2 v = total_of(item, place, unit, scale_of(place, row));
                if (lane() < 4 && local < HEAD_ROWS && book == book_of(a, row, step)) {
                    note_logit(a, place.shared, row, local, v.x, number);
                    note_logit(a, place.shared, row, local + 1, v.y, number);
                }
            }
            place.buffer ^= 1;
        }
    }
}

// Which of its logits a row may draw: all blocks' are read by every block.
__device__ void filter_logits(const Arguments& a, Shared& shared, u32 number) {
    constexpr int PADDED = BLOCKS * HEAD_ROWS, N = (PADDED / 2 + THREADS - 1) / THREADS;
    for (int b = 0; b < B; b++) {
        float mine[2 * N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            int i = j * THREADS + thread();
            uint4 v[1] = {make_uint4(__float_as_uint(NEVER), 0, __float_as_uint(NEVER), 0)};
            if (i < PADDED / 2)
                await(
                    v, [&](int) { return at(a, LOGITS_AT + b * PADDED / 2 + i); },
                    [&](const uint4& packet) { return packet.y == number && packet.w == number; });
            mine[2 * j] = __uint_as_float(v[0].x), mine[2 * j + 1] = __uint_as_float(v[0].z);
        }
        u32 least = smallest_kept<WARPS>(mine, a.rows[b], shared.scratch, 1);
        for (int i = thread(); i < HEAD_ROWS; i += THREADS)
            if (ordered(shared.logits[b][i]) < least) shared.logits[b][i] = NEVER;
    }
    sync();
}

// Each row's token, found alike by every block.
__device__ void draw(const Arguments& a, Shared& shared, int step, u32 number) {
    if (warp() < B) {
        int b = warp();
        const Row& row = a.rows[b];
        Candidate best = nothing();
#pragma unroll 1
        for (int i = lane(); i < HEAD_ROWS; i += 32)
            best =
                combine(best, consider(shared.logits[b][i], shared.noise[b][i], blockIdx.x * HEAD_ROWS + i, END, row));
        best = combine_warp(best);
        u8* to = at(a, CANDIDATE_AT + (b * BLOCKS + blockIdx.x) * 2);
        int copy = lane() / 2;  // three words and the step's number in each of two packets
        if (copy < COPIES && lane() % 2 == 0)
            publish_numbered(to + copy * (B * BLOCKS * 32), __float_as_uint(best.value), best.index, shared.halting, number);
        if (copy < COPIES && lane() % 2 && END >= 0)
            publish_numbered(to + copy * (B * BLOCKS * 32) + 16, __float_as_uint(best.peak), __float_as_uint(best.sum),
                             __float_as_uint(best.end), number);
        constexpr int EACH = (BLOCKS + 31) / 32, N_PACKETS = END < 0 ? 1 : 2;
        const u8* from = at(a, CANDIDATE_AT + ((blockIdx.x % COPIES * B + b) * BLOCKS + lane()) * 2);
        uint4 v[EACH * N_PACKETS];
        await(
            v,
            [&](int i) {
                int block = BLOCKS % 32 ? min(i / N_PACKETS * 32, BLOCKS - 1 - lane()) : i / N_PACKETS * 32;
                return from + block * 32 + i % N_PACKETS * 16;
            },
            [&](const uint4& packet) { return packet.w == number; });
        bool halting = v[0].z;  // lane 0's is block 0's
        best = nothing();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            uint4 first = v[i * N_PACKETS], second = v[i * N_PACKETS + N_PACKETS - 1];
            Candidate other = {__uint_as_float(first.x), (int)first.y, __uint_as_float(second.x), __uint_as_float(second.y),
                               __uint_as_float(second.z)};
            if (BLOCKS % 32 == 0 || lane() + i * 32 < BLOCKS) best = combine(best, other);
        }
        __syncwarp();
        best = combine_warp(best);
        if (lane() == 0) {
            RowState& state = shared.rows[b];
            if (state.running) {
                state.ended = ends(best, END, row) ? ENDED : 0;
                if (!state.ended) {
                    if (blockIdx.x == 0) a.tokens[b * BLOCK_SIZE + state.n_drawn] = best.index;
                    state.n_drawn++;
                }
                if (halting && !state.ended && state.n_drawn < row.n_tokens) state.ended = HALTED;
                state.running = !state.ended && state.n_drawn < row.n_tokens;
                if (state.running) {  // a finished row feeds its last position again and again: the same keys, the same
                                      // values
                    state.length++;
                    state.ids[0] = FIRST_ID + book_of(a, b, step) * BOOK_SIZE + best.index;
                    state.ids[1] = NO_ID;
                }
            }
        }
    }
    sync();
}

__device__ __forceinline__ bool is_anybody_running(const Shared& shared) {
    bool running = false;
#pragma unroll
    for (int b = 0; b < B; b++) running |= shared.rows[b].running;
    return running;
}

// ---- the helping warp: the newest positions' attention, and the noise ----

__device__ void helping_warp(const Arguments& a, Shared& shared) {
    for (int step = 0; step < a.n_steps; step++) {
#pragma unroll 1
        for (int layer = 0; layer < N_LAYERS; layer++) attend_newest(a, shared, layer, layer % 2 == 0);
        bool halting = blockIdx.x == 0 && lane() == 0 && is_halted(a.halted, a.launch);
#pragma unroll 1
        for (int i = lane(); i < B * HEAD_TILES * 2; i += 32) {
            int b = i / (HEAD_TILES * 2), unit = i % (HEAD_TILES * 2);
            const Row& row = a.rows[b];
            if (row.temperature != 0)
                gumbel_block(&shared.noise[b][unit * 8], row.seed, STAGE, row.position + step,
                             blockIdx.x * HEAD_TILES * 2 + unit);
        }
        if (lane() == 0) shared.halting = halting;
        sync_threads(2, THREADS + 32);  // noise ready
        sync_threads(3, THREADS + 32);  // noise used, rows' states moved on
        if (!is_anybody_running(shared)) return;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 64, 1) decode(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ Shared shared;
    if (thread() == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], WARPS * ARRIVING_LANES);
        for (int i = 0; i < IN_FLIGHT; i++) barrier_init(&shared.landed[i], 1);
        barrier_init_fence();
        shared.stop = 0;
    }
    if (thread() < B) {
        const Row& row = a.rows[thread()];
        int id = row.ids[0], ended = 0;
        if (id < 0) {  // -n: the n-th token of the call before, which drew it for the position before, unless it ended or was halted first
            id = FIRST_ID + (row.position + N_BOOKS - 1) % N_BOOKS * BOOK_SIZE + a.tokens[thread() * BLOCK_SIZE - id - 1];
            ended = a.result[thread() * 2 + 1];
        }
        shared.rows[thread()] = {row.length, {id, row.ids[1]}, 0, row.n_tokens > 0 && !ended, ended};
    }
    float* partial = (float*)(memory + STAGES * STAGE_TILES * TILE);
    float* scales = partial + 2 * WARPS * STAGE_UNITS * B * 8;
    if (QUANTIZED)
        for (int i = thread(); i < ALL_UNITS * 8; i += THREADS + 64)
            scales[i] = a.scales[(size_t)blockIdx.x * ALL_UNITS * 8 + i];
    __syncthreads();
    if (warp() == WARPS) return copying_warp(a, shared, memory);
    if (warp() == WARPS + 1) return helping_warp(a, shared);
    Place place = {shared, memory, partial, scales, 0, 0};
    for (int step = 0; step < a.n_steps; step++) {
        uint4 act[1][PAIRS];
        embed(act[0], a, shared);
#pragma unroll 1
        for (int layer = 0; layer < N_LAYERS; layer++) layer_step(a, place, act, layer);
        head_step(a, place, step, a.number + step);
        sync_threads(2, THREADS + 32);  // the noise is ready
        if (a.filter) filter_logits(a, shared, a.number + step);
        draw(a, shared, step, a.number + step);
        bool running = is_anybody_running(shared);
        if (!running && thread() == 0) shared.stop = 1;
        sync_threads(3, THREADS + 32);
        if (!running) break;
    }
    if (blockIdx.x == 0 && thread() < B) {
        a.result[thread() * 2] = shared.rows[thread()].n_drawn;
        a.result[thread() * 2 + 1] = shared.rows[thread()].ended;
    }
}
