#include "cpu/thread_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#if defined(__linux__)
#include <sched.h>
#endif

namespace minisgl::cpu {
namespace {

constexpr int kSpins = 2000;  // about 50 µs
ThreadPool* current = nullptr;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// $OMP_NUM_THREADS, which PyTorch heeds too; else the cores that this process may use and its control group may fill.
int default_size() {
    const char* wanted = std::getenv("OMP_NUM_THREADS");
    if (wanted != nullptr && std::atoi(wanted) > 0) return std::atoi(wanted);
    int count = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) count = CPU_COUNT(&set);
    double quota = 0, period = 0;
    std::ifstream limit("/sys/fs/cgroup/cpu.max");  // "max …" where there is none
    if (limit >> quota >> period && period > 0) count = std::min(count, static_cast<int>(std::ceil(quota / period)));
#endif
    return std::max(1, count);
}

}  // namespace

ThreadPool& ThreadPool::instance() {
    static const int once = [] {
        current = new ThreadPool;
        // Threads don't survive a fork: the child leaves the old pool alone. Never destroyed: workers may outlive main.
        return pthread_atfork(nullptr, nullptr, [] { current = new ThreadPool; });
    }();
    static_cast<void>(once);
    return *current;
}

ThreadPool::ThreadPool() : size_(default_size()) {}

void ThreadPool::resize(int size) {
    const std::lock_guard lock(mutex_);
    stop();
    size_ = std::max(1, size);
}

void ThreadPool::stop() {
    stopping_ = true;
    left_ = -1;
    left_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    left_ = 0;
    stopping_ = false;
}

void ThreadPool::loop(int count, Call call, void* body) {
    if (size_ == 1 || count <= 1) {
        for (int i = 0; i < count; ++i) call(body, i);
        return;
    }
    const std::lock_guard lock(mutex_);
    while (static_cast<int>(workers_.size()) < size_ - 1) workers_.emplace_back([this] { work(); });
    call_ = call, body_ = body, count_ = count;
    done_.store(0, std::memory_order_relaxed);
    left_.store(count, std::memory_order_release);
    left_.notify_all();
    while (take_one()) {
    }
    for (int spins = 0, done; (done = done_.load(std::memory_order_acquire)) != count; ++spins)
        spins < kSpins ? pause() : done_.wait(done, std::memory_order_acquire);
}

bool ThreadPool::take_one() {
    int left = left_.load(std::memory_order_relaxed);
    do {
        if (left <= 0) return false;
    } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed));
    const int count = count_;
    call_(body_, count - left);
    if (done_.fetch_add(1, std::memory_order_release) + 1 == count) done_.notify_one();
    return true;
}

void ThreadPool::work() {
    for (int spins = 0; !stopping_; ++spins) {
        if (take_one()) {
            spins = 0;
        } else if (spins < kSpins) {
            pause();
        } else {
            left_.wait(0);
            spins = 0;
        }
    }
}

float* thread_scratch(std::size_t floats) {
    struct alignas(64) Line {
        float values[16];
    };
    thread_local std::vector<Line> memory;
    if (memory.size() * 16 < floats) memory.resize((floats + 15) / 16);
    return memory.data()->values;
}

}  // namespace minisgl::cpu
