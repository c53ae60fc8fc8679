// The threads that share a kernel's work.
#pragma once

#include <atomic>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace minisgl::cpu {

// `run` splits a loop over the caller and size() - 1 workers, which take one index after another. Between loops a
// worker looks out for the next one for some microseconds, then sleeps: a step's loops follow closely, idle engines
// burn nothing.
class ThreadPool {
  public:
    // The pool of this process; a forked child gets one of its own.
    static ThreadPool& instance();

    // As many as there are cores for this process, or as $OMP_NUM_THREADS says, until `resize` says otherwise.
    int size() const { return size_; }
    void resize(int size);

    // body(0), …, body(count - 1), in no order, from several threads; returns when all have ended. `body` mustn't
    // throw.
    template <class Body>
    void run(int count, Body&& body) {
        using Plain = std::remove_reference_t<Body>;
        loop(
            count, [](void* self, int i) { (*static_cast<Plain*>(self))(i); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

  private:
    using Call = void (*)(void*, int);

    ThreadPool();
    void loop(int count, Call call, void* body);
    bool take_one();
    void work();
    void stop();

    int size_;
    std::mutex mutex_;  // one loop at a time
    std::vector<std::thread> workers_;
    std::atomic<bool> stopping_{false};
    // The loop under way. Who has taken an index knows that `done_` can't be complete, so that the rest stands still.
    Call call_ = nullptr;
    void* body_ = nullptr;
    int count_ = 0;
    alignas(64) std::atomic<int> left_{0};  // indices that nobody has taken
    alignas(64) std::atomic<int> done_{0};
};

// Memory of the calling thread, aligned for vectors, valid until its next call.
float* thread_scratch(std::size_t floats);

}  // namespace minisgl::cpu
