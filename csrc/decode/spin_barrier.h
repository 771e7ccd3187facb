// A barrier for threads that meet every few microseconds: it spins, and yields when a thread must have lost its core.
#pragma once

#include <atomic>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace e3 {

// Always inlined: the objects of two instruction sets must not share one copy.
#define E3_ALWAYS_INLINE inline __attribute__((always_inline))

E3_ALWAYS_INLINE void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : threads_(threads) {}

  E3_ALWAYS_INLINE void wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
      if (spins < kSpins)
        relax();
      else
        std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 4096;
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

}  // namespace e3
