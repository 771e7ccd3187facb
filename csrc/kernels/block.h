// Rows of logits, one block at a time: storage dtype <-> fp32 scratch that stays in the first-level cache.
#pragma once

#include <memory>

#include "kernels/parallel.h"
#include "kernels/problem.h"
#include "kernels/simd.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kBlock = 2048;
inline constexpr int kStep = 2 * kLanes;  // two independent chains hide the latency of an addition

// Scratch past the end of a row: e^{padding − m} is 0, and differences of paddings stay finite.
inline constexpr float kPadding = -1e30f;

inline int padded(int count) { return (count + kStep - 1) / kStep * kStep; }

struct Range {
  float high;
  float low;
};

template <bool kCapped>
inline Vf transformed(Vf z, const Transform& transform) {
  if constexpr (!kCapped) return z * (transform.scale / transform.temperature);
  const Vf capped = tanh(z * (transform.scale / transform.softcap));
  return capped * (transform.softcap / transform.temperature);
}

template <bool kCapped, class T>
inline void load_step(const T* source, const Transform& transform, float* target, Vf (&high)[2], Vf (&low)[2]) {
  for (int chain = 0; chain < 2; ++chain) {
    const Vf x = transformed<kCapped>(load(source + chain * kLanes), transform);
    store(target + chain * kLanes, x);
    high[chain] = max(high[chain], x);
    low[chain] = min(low[chain], x);
  }
}

template <bool kCapped, class T>
Range load_steps(const T* source, int count, const Transform& transform, const T* ahead, float* target) {
  Vf high[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  Vf low[2] = {broadcast(kInfinity), broadcast(kInfinity)};
  int i = 0;
  for (; i + kStep <= count; i += kStep) {
    if (ahead != nullptr) {
      const char* line = reinterpret_cast<const char*>(ahead + i);
      for (unsigned byte = 0; byte < kStep * sizeof(T); byte += 64) __builtin_prefetch(line + byte, 0, 2);
    }
    load_step<kCapped>(source + i, transform, target + i, high, low);
  }
  if (i < count) {
    T rest[kStep];
    for (int j = 0; j < kStep; ++j) rest[j] = source[i + j < count ? i + j : i];
    load_step<kCapped>(rest, transform, target + i, high, low);
    for (int j = count; j < padded(count); ++j) target[j] = kPadding;
  }
  return {horizontal_max(max(high[0], high[1])), horizontal_min(min(low[0], low[1]))};
}

// ∂x·T/∂z of a value x that load_block wrote, times `g`, in place: scale·(1 − tanh²), tanh = x·T/c.
inline void transform_gradient(const float* x, int count, const Transform& transform, float* g) {
  const float inverse = transform.softcap > 0 ? transform.temperature / transform.softcap : 0.0f;
  for (int i = 0; i < count; i += kLanes) {
    const Vf tangent = load(x + i) * inverse;
    store(g + i, load(g + i) * (transform.scale * (1.0f - tangent * tangent)));
  }
}

template <class T>
void store_steps(const float* source, int count, bool stream_out, T* target) {
  constexpr int kBytes = kLanes * sizeof(T);
  int i = 0;
  if (stream_out) {
    for (; i < count && reinterpret_cast<uintptr_t>(target + i) % kBytes != 0; ++i) store_one(target + i, source[i]);
    for (; i + kLanes <= count; i += kLanes) stream(target + i, load(source + i));
  }
  for (; i + kLanes <= count; i += kLanes) store(target + i, load(source + i));
  for (; i < count; ++i) store_one(target + i, source[i]);
}

// body(begin, count) for each block of a row, over the pool's threads.
template <class Body>
inline void for_each_block(const Parallel& pool, int64_t columns, const Body& body) {
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  parallel_for(pool, blocks, 1, [&](int64_t first, int64_t last) {
    const FlushSubnormals guard;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock;
      body(begin, static_cast<int>(columns - begin < kBlock ? columns - begin : kBlock));
    }
    if (pool.threads > 1) stream_fence();
  });
}

// Joins part(begin, count) of every block in the order of the blocks, whatever the threads.
template <class Sums, class Part, class Join>
inline Sums fold_blocks(const Parallel& pool, int64_t columns, const Part& part, const Join& join) {
  Sums total{};
  if (pool.threads <= 1) {
    for_each_block(pool, columns, [&](int64_t begin, int count) { join(total, part(begin, count)); });
    return total;
  }
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
  const std::unique_ptr<Sums[]> parts(new Sums[blocks]);
  for_each_block(pool, columns, [&](int64_t begin, int count) { parts[begin / kBlock] = part(begin, count); });
  for (int64_t block = 0; block < blocks; ++block) join(total, parts[block]);
  return total;
}

// body(element of the storage type).
template <class Body>
inline auto with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bfloat16: return body(bf16{});
    case DType::float16: return body(fp16{});
    default: return body(float{});
  }
}

// Writes x = f(z)/T of the logits z in columns [begin, begin + count) of `row`, count <= kBlock, to `target` (padded to a
// multiple of kStep) and returns their range; NaN may be missing from the range, never from `target`. The same columns of
// row `ahead`, unless negative, are brought into the cache.
inline Range load_block(const Rows& rows, int64_t row, int64_t begin, int count, const Transform& transform,
                        float* target, int64_t ahead = -1) {
  return with_dtype(rows.dtype, [&](auto element) {
    using T = decltype(element);
    const T* base = static_cast<const T*>(rows.data) + begin;
    const T* next = ahead < 0 ? nullptr : base + ahead * rows.stride;
    return transform.softcap > 0 ? load_steps<true>(base + row * rows.stride, count, transform, next, target)
                                 : load_steps<false>(base + row * rows.stride, count, transform, next, target);
  });
}

// Rounds `count` values to columns [begin, begin + count) of a row of `dtype`.
inline void store_block(const float* source, int count, DType dtype, bool stream_out, void* row, int64_t begin) {
  with_dtype(dtype, [&](auto element) {
    store_steps(source, count, stream_out, static_cast<decltype(element)*>(row) + begin);
  });
}

}  // namespace e3::E3_ISA_NAMESPACE
