#if defined(__x86_64__)
#include "cpu/kernels.inl"

namespace minisgl::cpu {
extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = MINISGL_CPU_KERNELS("avx512");
}  // namespace minisgl::cpu
#endif
