// Packets of 16 bytes, at once written and read by different blocks, through L2: what is polled for comes with its own mark, so that
// an exchange takes one store and one load, and no fence.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ void store_packet(u8* to, u64 low, u64 high) {
    asm volatile(
        "{\n.reg .b128 packet;\nmov.b128 packet, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], packet;\n}" ::"l"(to),
        "l"(low), "l"(high)
        : "memory");
}
__device__ __forceinline__ void publish_numbered(u8* to, u32 x, u32 y, u32 z, u32 number) {
    store_packet(to, (u64)y << 32 | x, (u64)number << 32 | z);
}

// Packets of activations are odd or even, by the lowest bit of their first word.
__device__ __forceinline__ void publish(u8* to, uint4 v, u32 odd) {
    store_packet(to, (u64)v.y << 32 | ((v.x & ~1u) | odd), (u64)v.w << 32 | v.z);
}

__device__ __forceinline__ uint4 peek(const u8* from) {
    u64 low, high;
    asm volatile("{\n.reg .b128 packet;\nld.relaxed.gpu.global.b128 packet, [%2];\nmov.b128 {%0, %1}, packet;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(from)
                 : "memory");
    return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}

// Polls: a wait of seconds means that a block died; an error is better than a hang.
constexpr u32 PATIENCE = UNDER_RACECHECK ? ~0u : 1u << 23;

// Polls N packets, at address(i), until all of them are wanted. Polls hold up the packets that they are after, and each other's: so
// callers first let a while pass in which nothing can come (`let_pass`, the cycles found by trying), and never poll more lines of 128
// bytes than they must.
template <int N, class Address, class Wanted>
__device__ __forceinline__ void await(uint4 (&v)[N], Address address, Wanted wanted) {
    bool ready;
    u32 patience = PATIENCE;
    do {
        ready = true;
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = peek(address(i));
#pragma unroll
        for (int i = 0; i < N; i++) ready &= wanted(v[i]);
        if (--patience == 0) __trap();
    } while (!ready);
}
