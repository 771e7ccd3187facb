// Threads for one parallel region a token. Between regions they spin for a while, then sleep.
#pragma once

#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "decode/spin_barrier.h"

namespace e3 {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads) { start(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    if (process_ == getpid())
      shared_->stop();
    else
      shared_.release();  // after a fork: these threads live in the parent, their handles cannot be joined here
  }

  int threads() const { return threads_; }

  // Calls region(thread) on every thread at once, the caller being thread 0; returns when all have returned.
  template <class Region>
  void run(const Region& region) {
    if (process_ != getpid()) {
      shared_.release();
      start();
    }
    shared_->call = [](const void* argument, int thread) { (*static_cast<const Region*>(argument))(thread); };
    shared_->argument = &region;
    shared_->running.store(threads_ - 1, std::memory_order_relaxed);
    shared_->round.fetch_add(1, std::memory_order_release);
    shared_->round.notify_all();
    region(0);
    while (shared_->running.load(std::memory_order_acquire)) relax();
  }

 private:
  struct Shared {
    std::vector<std::thread> workers;
    void (*call)(const void*, int) = nullptr;
    const void* argument = nullptr;
    std::atomic<bool> stopping{false};
    alignas(64) std::atomic<unsigned> round{0};
    alignas(64) std::atomic<int> running{0};

    void work(int thread) {
      for (unsigned seen = 0;; ++seen) {
        for (int spins = 0; spins < kSpins && round.load(std::memory_order_acquire) == seen; ++spins) relax();
        round.wait(seen, std::memory_order_acquire);
        if (stopping.load(std::memory_order_acquire)) return;
        call(argument, thread);
        running.fetch_sub(1, std::memory_order_release);
      }
    }

    void stop() {
      stopping.store(true, std::memory_order_release);
      round.fetch_add(1, std::memory_order_release);
      round.notify_all();
      for (std::thread& worker : workers) worker.join();
    }
  };

  void start() {
    process_ = getpid();
    shared_ = std::make_unique<Shared>();
    for (int thread = 1; thread < threads_; ++thread)
      shared_->workers.emplace_back([shared = shared_.get(), thread] { shared->work(thread); });
  }

  static constexpr int kSpins = 4096;
  const int threads_;
  pid_t process_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace e3
