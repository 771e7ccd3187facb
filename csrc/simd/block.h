// Rows of logits, one block at a time: storage dtype <-> fp32 scratch that stays in the first-level cache.
#pragma once

#include <cmath>
#include <memory>
#include <type_traits>

#include "simd/parallel.h"
#include "simd/rows.h"
#include "simd/simd.h"
#include "simd/transform.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kBlock = 2048;
inline constexpr int kStep = 2 * kLanes;  // two independent chains hide the latency of an addition
inline constexpr int kRoom = kBlock + kLanes;  // a block's scratch: lanes past its end may be read

// Past the end of a row in plain sums: e^{padding − m} is 0, and differences of paddings stay finite.
inline constexpr float kPadding = -1e30f;

// References up to this size serve plain sums. Beside a larger one the rounding of an exponent shows in what is stored
// in 16 bits, and beside one of kPadding's size the padding would count.
inline constexpr float kPlainReference = 1024.0f;

inline bool serves_plain(float reference) { return std::fabs(reference) <= kPlainReference; }

inline int64_t whole_steps(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }
inline int padded(int count) { return static_cast<int>(whole_steps(count)); }

// Brings the lines of a row, read later, towards the core while a loop computes, kStep values of them a step.
//
// The hardware follows a stream of lines up to the end of its page, and a core that asks for lines of several pages by
// turns is served faster: on a Sapphire Rapids two cores read 20 GB/s in order, 26 GB/s from four pages, 29 GB/s from
// eight. Four, since student and teacher come at once. A window that the row does not fill is brought in order.
class Prefetch {
 public:
  static constexpr int64_t kPage = 4096, kPages = 4, kWindow = kPages * kPage;

  // From byte `offset` on, a multiple of kPages lines, of the row of `size` bytes at `row`.
  Prefetch(const char* row, int64_t offset, int64_t size, int64_t bytes_per_value)
      : step_(static_cast<int>(bytes_per_value) * kStep) {
    const int64_t window = offset / kWindow * kWindow, lines = (offset - window) / (kPages * kLineBytes);
    const bool by_turns = window + kWindow <= size;
    stride_ = by_turns ? kPage : kLineBytes;
    advance_ = by_turns ? kLineBytes : kPages * kLineBytes;
    at_ = row + window + lines * advance_;
  }
  void step() {
    if (done_ % (kPages * kLineBytes) == 0) {
      for (int64_t page = 0; page < kPages; ++page) __builtin_prefetch(at_ + page * stride_, 0, 2);
      at_ += advance_;
    }
    done_ += step_;
  }

 private:
  const char* at_;
  int64_t stride_, advance_;
  int step_;
  unsigned done_ = 0;
};

// Widens `count` values and maps each vector of them.
template <class T, class Map>
inline void convert(const T* source, int count, float* target, const Map& map) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, map(load(source + i)));
  if (i == count) return;
  T rest[kLanes] = {};
  for (int j = 0; i + j < count; ++j) rest[j] = source[i + j];
  store(target + i, map(load(rest)));
}

inline void scale_values(float* g, int count, float factor) {
  if (factor == 1.0f) return;
  for (int i = 0; i < count; i += kLanes) store(g + i, load(g + i) * factor);
}

// `g` times ∂f(z)/∂z, in place: scale, or scale·(1 − tanh²) with tanh = x·T/c of x = f(z)/T.
inline void transform_gradient(const float* x, int count, const Transform& transform, float* g) {
  if (transform.softcap <= 0) return scale_values(g, count, transform.scale);
  const float inverse = transform.temperature / transform.softcap;
  for (int i = 0; i < count; i += kLanes) {
    const Vf tangent = load(x + i) * inverse;
    store(g + i, load(g + i) * (transform.scale * (1.0f - tangent * tangent)));
  }
}

// body(begin, count) for each block of a row, over the pool's threads.
template <class Body>
inline void for_each_block(const Parallel& pool, int64_t columns, const Body& body) {
  const int64_t blocks = pieces(columns, kBlock);
  parallel_for(pool, blocks, 1, [&](int64_t first, int64_t last) {
    const FlushSubnormals guard;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock;
      body(begin, static_cast<int>(at_most(kBlock, columns - begin)));
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
  const int64_t blocks = pieces(columns, kBlock);
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

inline const char* address(const Rows& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.stride + column) * size_of(rows.dtype);
}

// What is read a window of lines after column `begin` of `row`; the last window is followed by the row `next`.
inline Prefetch prefetch_ahead(const Rows& rows, int64_t row, int64_t next, int64_t begin, int64_t columns) {
  constexpr int64_t kWindow = Prefetch::kWindow;
  const int64_t bytes = size_of(rows.dtype), size = columns * bytes, offset = begin * bytes + kWindow;
  const int64_t end = (size + kWindow - 1) / kWindow * kWindow;
  if (offset < end) return Prefetch(address(rows, row, 0), offset, size, bytes);
  return Prefetch(address(rows, next, 0), offset - end, size, bytes);
}

// x = f(z)/T of the logits z in columns [begin, begin + count) of `row`, count <= kBlock, padded by −∞ to a multiple of
// kStep: the row itself where it holds just that, else `scratch`.
inline const float* load_block(const Rows& rows, int64_t row, int64_t begin, int count, const Transform& transform,
                               float* scratch) {
  return with_dtype(rows.dtype, [&](auto element) -> const float* {
    using T = decltype(element);
    const T* source = reinterpret_cast<const T*>(address(rows, row, begin));
    if (transform.softcap > 0) {
      const float before = transform.scale / transform.softcap, after = transform.softcap / transform.temperature;
      convert(source, count, scratch, [=](Vf z) { return tanh(z * before) * after; });
    } else if (transform.scale != transform.temperature) {
      const float factor = transform.scale / transform.temperature;
      convert(source, count, scratch, [=](Vf z) { return z * factor; });
    } else {
      if constexpr (sizeof(T) == sizeof(float)) {
        if (count % kStep == 0) return source;
      }
      convert(source, count, scratch, [](Vf z) { return z; });
    }
    for (int i = count; i < padded(count); ++i) scratch[i] = -kInfinity;
    return scratch;
  });
}

// The values of one block of a row, ready to be summed: their storage type and where they lie.
struct BlockValues {
  DType dtype;
  const void* data;
};

// Columns [begin, begin + count) of `row` as load_block gives them, but padded by kPadding, or the row itself in its
// own dtype where they are as they are wanted and fill whole steps.
inline BlockValues block_values(const Rows& rows, int64_t row, int64_t begin, int count, const Transform& transform,
                                float* scratch) {
  const bool ready = transform.softcap <= 0 && transform.scale == transform.temperature && count % kStep == 0;
  if (ready) return {rows.dtype, address(rows, row, begin)};
  const float* values = load_block(rows, row, begin, count, transform, scratch);
  for (int i = count; i < padded(count); ++i) scratch[i] = kPadding;  // what is not whole lies in the scratch
  return {DType::float32, values};
}

// body(pointer to the values in their storage type).
template <class Body>
inline auto with_values(const BlockValues& values, const Body& body) {
  return with_dtype(values.dtype,
                    [&](auto element) { return body(static_cast<const decltype(element)*>(values.data)); });
}

// The largest of the values, −∞ among none; NaN may be missed.
inline float block_max(const float* x, int count) {
  Vf high = broadcast(-kInfinity);
  for (int i = 0; i < count; i += kLanes) high = max(high, load(x + i));
  return horizontal_max(high);
}

// The largest of the first values of a row of `columns`: few, since nothing has fetched them yet.
inline float first_max(const Rows& rows, int64_t row, int64_t columns, const Transform& transform) {
  constexpr int64_t kFirst = 256;
  alignas(64) float scratch[kFirst + kLanes];
  const int count = static_cast<int>(columns < kFirst ? columns : kFirst);
  return block_max(load_block(rows, row, 0, count, transform, scratch), padded(count));
}

// A reference m in fp32, and what exponentials relative to it have to be multiplied by to be relative to m itself.
struct Rounded {
  explicit Rounded(double m) : value(static_cast<float>(m)), exact(m) {}
  float factor(float temperature = 1.0f) const {
    return static_cast<float>(value == exact ? 1.0 : std::exp(temperature * (value - exact)));
  }
  float value;
  double exact;
};

// The reference m of exponentials of values stored as T, and y = (x − m)·log2 e. fp32 subtracts first, so that the
// largest value has exactly e⁰ = 1; the 16-bit types, whose own rounding hides the difference, save that step: with c =
// fl(m·log2 e), y = x·log2 e − c is one fused operation relative to c/log2 e, which takes the place of m.
template <class T>
class Reference {
 public:
  explicit Reference(float m) : m_(kSubtracts ? m : m * kBitsPerNat) {}
  double value() const { return kSubtracts ? m_ : m_ / double{kBitsPerNat}; }
  Vf bits_above(Vf x) const {
    return kSubtracts ? (x - m_) * kBitsPerNat : fma(x, broadcast(kBitsPerNat), broadcast(-m_));
  }

 private:
  static constexpr bool kSubtracts = sizeof(T) == sizeof(float);
  float m_;
};

// Σ e^{T·(x−m)}: the softmax without temperature that the cross-entropy needs.
template <class T>
double sum_untempered(const T* x, int count, double reference, float temperature) {
  const Rounded m(reference);
  Vf sum[2] = {};
  for (int i = 0; i < count; i += kStep) {
    for (int chain = 0; chain < 2; ++chain) {
      sum[chain] += exp((load(x + i + chain * kLanes) - m.value) * temperature);
    }
  }
  return horizontal_sum(sum[0] + sum[1]) * m.factor(temperature);
}

// Rounds value(i), the lanes from i on, for i in [0, count) to `target`, past the caches if asked. `value` may be asked
// for lanes past the end, up to kLanes − 1 of them, unless stores_whole.
template <class T, class Value>
void store_typed(int count, bool stream_out, T* target, const Value& value) {
  constexpr int kBytes = kStreamed<T> * sizeof(T);
  const int head = static_cast<int>(-reinterpret_cast<uintptr_t>(target) % kBytes / sizeof(T));
  int i = 0;
  if (stream_out && head + kStreamed<T> <= count) {
    // The last vector before the first line may reach into it: written twice, with the same values.
    for (; i < head; i += kLanes) store(target + i, value(i));
    for (i = head; i + kStreamed<T> <= count; i += kStreamed<T>) {
      if constexpr (kStreamed<T> == kLanes) {
        stream(target + i, value(i));
      } else {
        stream(target + i, value(i), value(i + kLanes));
      }
    }
  }
  for (; i + kLanes <= count; i += kLanes) store(target + i, value(i));
  for (; i < count; ++i) store_one(target + i, value(i)[0]);
}

// Whether store_typed asks for whole vectors only.
template <class T>
bool stores_whole(int count, bool stream_out, const T* target) {
  return count % kLanes == 0 && (!stream_out || reinterpret_cast<uintptr_t>(target) % (kLanes * sizeof(T)) == 0);
}

// The same to columns [begin, begin + count) of a row of `dtype`.
template <class Value>
void store_values(int count, DType dtype, bool stream_out, void* row, int64_t begin, const Value& value) {
  with_dtype(dtype, [&](auto element) {
    store_typed(count, stream_out, static_cast<decltype(element)*>(row) + begin, value);
  });
}

inline void store_block(const float* source, int count, DType dtype, bool stream_out, void* row, int64_t begin) {
  store_values(count, dtype, stream_out, row, begin, [&](int i) { return load(source + i); });
}

}  // namespace e3::E3_ISA_NAMESPACE
