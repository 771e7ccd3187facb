// out = h + m·(f − h), and its gradient:  dh = (1 − m)·g,  df = m·g,  dm = Σ g·(f − h),  where 0·∞ = 0·NaN = 0.
//
// For |m| >= ½ the same value is f − (1 − m)·(f − h). m = 0 gives h and m = 1 gives f, whatever the other is. The
// tensors are (rows, columns) without gaps; the gate holds one value a row or one an element.
#pragma once

#include <memory>

#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

// One block of a row: where it starts, in the row and in the tensor.
struct Stretch {
  int64_t row;
  int64_t block;
  int64_t at;
  int count;
};

// `count` values widened to `scratch`, where lanes past the end may be read.
inline const float* padded_block(const void* data, DType dtype, int64_t at, int count, float* scratch) {
  with_dtype(dtype, [&](auto element) {
    convert(static_cast<const decltype(element)*>(data) + at, count, scratch, [](Vf value) { return value; });
  });
  return scratch;
}

template <class Body>
inline void for_each_stretch(const GatedResidual& problem, const Parallel& pool, const Body& body) {
  const int64_t blocks = (problem.columns + kBlock - 1) / kBlock;
  parallel_for(pool, problem.rows * blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / blocks, block = i % blocks, left = problem.columns - block * kBlock;
      body(
          Stretch{row, block, row * problem.columns + block * kBlock, static_cast<int>(left < kBlock ? left : kBlock)});
    }
    stream_fence();
  });
}

// The gate's values on a stretch.
class Gate {
 public:
  Gate(const GatedResidual& problem, const Stretch& stretch) : by_element_(problem.gate_by_element) {
    const int64_t at = by_element_ ? stretch.at : stretch.row;
    padded_block(problem.gate, problem.gate_dtype, at, by_element_ ? stretch.count : 1, values_);
    value_ = broadcast(values_[0]);
  }
  Vf at(int i) const { return by_element_ ? load(values_ + i) : value_; }

 private:
  alignas(64) float values_[kRoom];
  Vf value_;
  bool by_element_;
};

inline Vf interpolate(Vf h, Vf f, Vf m) {
  const Vf delta = f - h;
  const Vf between = select(Vi(max(m, -m) < 0.5f), Vf(h + m * delta), Vf(f - (1.0f - m) * delta));
  return select(Vi(m == 0.0f), h, select(Vi(m == 1.0f), f, between));
}

// coefficient·value, 0 wherever the coefficient is 0.
inline Vf weighted(Vf coefficient, Vf value) { return select(Vi(coefficient == 0.0f), Vf{}, Vf(coefficient * value)); }

inline void gated_residual(const GatedResidual& problem, const Parallel& pool, bool stream_out, void* out) {
  for_each_stretch(problem, pool, [&](const Stretch& stretch) {
    const Gate gate(problem, stretch);
    with_dtype(problem.dtype, [&](auto element) {
      using T = decltype(element);
      T* target = static_cast<T*>(out) + stretch.at;
      const auto interpolated = [&](const auto* h, const auto* f) {
        store_typed(stretch.count, stream_out, target,
                    [&](int i) { return interpolate(load(h + i), load(f + i), gate.at(i)); });
      };
      if (stores_whole(stretch.count, stream_out, target)) {
        return interpolated(static_cast<const T*>(problem.hidden) + stretch.at,
                            static_cast<const T*>(problem.branch) + stretch.at);
      }
      alignas(64) float hidden[kRoom], branch[kRoom];
      interpolated(padded_block(problem.hidden, problem.dtype, stretch.at, stretch.count, hidden),
                   padded_block(problem.branch, problem.dtype, stretch.at, stretch.count, branch));
    });
  });
}

// Where a stretch of the gradients goes; `gate` is null where the gate has one value a row.
template <class T>
struct Gradients {
  T* hidden;
  T* branch;
  float* gate;
};

// Gradients of a stretch, and Σ g·(f − h) of it. The values lie in their storage type, or widened where the last vector
// is not whole.
template <class S, class T>
double gate_gradients(const S* g, const S* h, const S* f, const Gate& gate, int count, bool stream_out,
                      Gradients<T> out) {
  store_typed(count, stream_out, out.hidden, [&](int i) { return weighted(1.0f - gate.at(i), load(g + i)); });
  Vf sum{};
  const auto product = [&](int i) { return weighted(load(g + i), load(f + i) - load(h + i)); };
  store_typed(count, stream_out, out.branch, [&](int i) { return weighted(gate.at(i), load(g + i)); });
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (out.gate != nullptr) store(out.gate + i, product(i));
    sum += product(i);
  }
  double total = horizontal_sum(sum);
  for (int lane = 0; i + lane < count; ++lane) {
    const float value = product(i)[lane];
    if (out.gate != nullptr) out.gate[i + lane] = value;
    total += value;
  }
  return total;
}

// `grad_gate` is fp32, one value a row or an element; sums over a row are fp32 in a block, fp64 over blocks in their
// order.
inline void gated_residual_backward(const GatedResidual& problem, const void* grad, const Parallel& pool,
                                    bool stream_out, void* grad_hidden, void* grad_branch, float* grad_gate) {
  const int64_t blocks = (problem.columns + kBlock - 1) / kBlock;
  const std::unique_ptr<double[]> sums(new double[problem.rows * blocks]);
  for_each_stretch(problem, pool, [&](const Stretch& stretch) {
    const Gate gate(problem, stretch);
    double& sum = sums[stretch.row * blocks + stretch.block];
    with_dtype(problem.dtype, [&](auto element) {
      using T = decltype(element);
      const Gradients<T> out{static_cast<T*>(grad_hidden) + stretch.at, static_cast<T*>(grad_branch) + stretch.at,
                             problem.gate_by_element ? grad_gate + stretch.at : nullptr};
      if (stores_whole(stretch.count, stream_out, out.hidden) && stores_whole(stretch.count, stream_out, out.branch)) {
        const auto values = [&](const void* data) { return static_cast<const T*>(data) + stretch.at; };
        sum = gate_gradients(values(grad), values(problem.hidden), values(problem.branch), gate, stretch.count,
                             stream_out, out);
        return;
      }
      alignas(64) float g[kRoom], h[kRoom], f[kRoom];
      sum = gate_gradients(padded_block(grad, problem.dtype, stretch.at, stretch.count, g),
                           padded_block(problem.hidden, problem.dtype, stretch.at, stretch.count, h),
                           padded_block(problem.branch, problem.dtype, stretch.at, stretch.count, f), gate,
                           stretch.count, stream_out, out);
    });
  });
  if (problem.gate_by_element) return;
  for (int64_t row = 0; row < problem.rows; ++row) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[row * blocks + block];
    grad_gate[row] = static_cast<float>(total);
  }
}

}  // namespace e3::E3_ISA_NAMESPACE
