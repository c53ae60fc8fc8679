// The bulk copy engine of compute capability 9.0 and later: contiguous bytes between global and shared memory.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900
namespace bulk {

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// One thread announces bytes and waits for them; used once.
struct Barrier {
  uint64 state;
  __device__ void init() {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // before the copy engine sees it
  }
  __device__ void wait() {
    unsigned done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
          : "=r"(done) : "r"(shared_address(&state)) : "memory");
    } while (!done);
  }
};

// Asks for kBytes (a multiple of 16; both sides aligned to 16); `arrived` tells when they are there.
template <int kBytes> __device__ void load(void* dst, const void* src, Barrier& arrived) {
  const unsigned barrier = shared_address(&arrived.state);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(kBytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(dst)), "l"(src), "n"(kBytes), "r"(barrier) : "memory");
}

template <int kBytes> __device__ void store(void* dst, const void* src) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(shared_address(src)),
               "n"(kBytes) : "memory");
}

// Waits until this thread's stores have read shared memory, which must outlive them.
__device__ inline void finish() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace bulk
#endif
