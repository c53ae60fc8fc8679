#include "cpu/kernels.inl"

namespace minisgl::cpu {
extern const Kernels kernels_portable;
const Kernels kernels_portable = MINISGL_CPU_KERNELS("portable");
}  // namespace minisgl::cpu
