// The few PTX instructions that the kernels need, by name. No headers: NVRTC compiles this on machines without a
// toolkit.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef UNDER_RACECHECK
#define UNDER_RACECHECK 0
#endif

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- bf16, two to a word ----
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float bf16(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// ---- f16, two to a word ----
__device__ __forceinline__ float low_f16(u32 pair) {
    float x;
    asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x) : "r"(pair));
    return x;
}
__device__ __forceinline__ float high_f16(u32 pair) { return low_f16(pair >> 16); }
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// ---- bytes 0 to 255, which mean -128 to 127 ----
// Two of a word's bytes as f16, each RAISED by as much: 0x64 above a byte makes 1024 + byte. selector: as prmt's, of {word, four times
// 0x64}.
constexpr float RAISED = 1024 + 128;
__device__ __forceinline__ u32 bytes_raised(u32 word, u32 selector) {
    u32 pair;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(word), "r"(0x64646464u), "r"(selector));
    return pair;
}
__device__ __forceinline__ u32 bytes_as_f16(u32 word, u32 selector) {
    u32 pair = bytes_raised(word, selector);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x64806480u));
    return pair;
}
constexpr u32 BYTES_01 = 0x4140, BYTES_23 = 0x4342, BYTES_02 = 0x4240, BYTES_13 = 0x4341;
// Four numbers -127 to 127 as such bytes.
__device__ __forceinline__ u32 pack_bytes(float a, float b, float c, float d) {
    return (u32)(__float2int_rn(a) + 128) | (u32)(__float2int_rn(b) + 128) << 8 | (u32)(__float2int_rn(c) + 128) << 16 |
           (u32)(__float2int_rn(d) + 128) << 24;
}

// ---- tensor cores: d[16 x 8] += a[16 x 16] b[16 x 8], bf16 operands (or f16), fp32 sums ----
// a: a0 = rows 0-7, k 0-7; a1 = rows 8-15, k 0-7; a2 = rows 0-7, k 8-15; a3 = rows 8-15, k 8-15
template <bool F16 = false>
__device__ __forceinline__ void multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (F16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four matrices [8 x 8] of 16 bits an element out of shared memory, 16 bytes a row, at the addresses of lanes 0-7,
// 8-15 ...: lane 4 g + t gets elements 2 t, 2 t + 1 of row g; transposed, of column g.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&m)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// ---- barriers in shared memory (mbarrier), and the bulk copies that complete on them ----
__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier, u32 count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Which lanes of a warp arrive when it has read what a barrier guards, behind a __syncwarp: one, for all. compute-sanitizer's racecheck
// does not know that it stands for the others (tests/sanitize.py), so for it all arrive.
constexpr u32 ARRIVING_LANES = UNDER_RACECHECK ? 32 : 1;
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni ready;\nbra.uni again;\nready:\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// A bulk copy of what nobody will read again soon: it leaves L2 first.
__device__ __forceinline__ void copy_once_to_shared(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile(
        "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], policy;\n}" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ u32 clock_cycles() {
    u32 cycles;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(cycles)::"memory");
    return cycles;
}
// Lets N cycles pass, and touches no memory.
template <int N>
__device__ __forceinline__ void let_pass() {
    if constexpr (N > 0)
        for (u32 start = clock_cycles(); clock_cycles() - start < N;);
}

// ---- a named barrier of some of a block's warps ----
__device__ __forceinline__ void sync_threads(u32 id, u32 n_threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// Not through L1, which other blocks' stores don't reach. If not `there`: zeros, and no branch.
__device__ __forceinline__ uint4 load_cached_l2(const void* p, bool there = true) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %5, 0;\n@there ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)there));
    return v;
}
__device__ __forceinline__ uint2 load_cached_l2_8(const void* p, bool there) {
    uint2 v = make_uint2(0, 0);
    asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %3, 0;\n@there ld.global.cg.v2.u32 {%0, %1}, [%2];\n}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(p), "r"((int)there));
    return v;
}
__device__ __forceinline__ float load_cached_l2_4(const void* p, bool there) {
    float v = 0;
    asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %2, 0;\n@there ld.global.cg.f32 %0, [%1];\n}"
                 : "+f"(v)
                 : "l"(p), "r"((int)there));
    return v;
}
// If not `there`, v stays as it is.
__device__ __forceinline__ void load_cached_l2(float4& v, const float* p, bool there) {
    asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %5, 0;\n@there ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w)
                 : "l"(p), "r"((int)there));
}
