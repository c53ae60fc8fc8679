// The CPU kernels' Python face.
#pragma once

#include <nanobind/nanobind.h>

namespace minisgl::cpu {

// Adds PackedWeight, Decoder and the cpu_… functions to `module`. Arrays come as addresses (Tensor.data_ptr()): the
// callers in minisgl.kernels.cpu check shapes and types, and a call costs no more than a microsecond.
void bind(nanobind::module_& module);

}  // namespace minisgl::cpu
