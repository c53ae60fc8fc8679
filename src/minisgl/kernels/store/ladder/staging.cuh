// What the store's variants share: whose token a warp serves, and asynchronous copies into shared memory.
#pragma once
#include "common.cuh"

// 16 bytes from global to shared memory, through L2 alone; the thread goes on before they have arrived.
__device__ inline void copy_async(uint4* shared, const uint4* global) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// Until all that this thread copied has arrived; what other threads copied needs a barrier besides.
__device__ inline void wait_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline bool within(int64 slot, int64 num_slots) {
    return static_cast<uint64>(slot) < static_cast<uint64>(num_slots);
}
