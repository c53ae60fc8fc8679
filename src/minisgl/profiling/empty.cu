// The floor of any launch: a kernel that does nothing but take part in dependent launch.
#include "common.cuh"

extern "C" __global__ void empty() {
    pdl::trigger();
    pdl::wait();
}
