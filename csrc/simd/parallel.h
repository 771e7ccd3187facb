// The caller's thread pool, handed in as two plain values so that kernels know no library.
#pragma once

#include <cstdint>

namespace e3 {

struct Parallel {
  int threads;
  // Calls body(first, last, context) on disjoint ranges that cover [begin, end), each of at least `grain` iterations.
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};

// How many pieces of `size` cover `count`.
inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }

template <class Body>
inline void parallel_for(const Parallel& pool, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (pool.threads <= 1 || count <= grain) return body(int64_t{0}, count);
  pool.run(
      0, count, grain,
      [](int64_t first, int64_t last, void* context) { (*static_cast<const Body*>(context))(first, last); },
      const_cast<Body*>(&body));
}

}  // namespace e3
