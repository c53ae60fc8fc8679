// One kernel as a library: the arguments come as 64-bit words, as a launch passes them.
#include KERNEL

extern "C" void run_grid(unsigned blocks, unsigned threads, const long long* a) {
    launch(blocks, threads, [=] { CALL; });
}
