#if defined(__x86_64__)
#include "cpu/kernels.inl"

namespace minisgl::cpu {
extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = MINISGL_CPU_KERNELS("avx2");
}  // namespace minisgl::cpu
#endif
