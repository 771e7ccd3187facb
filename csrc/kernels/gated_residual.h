// out = h + m·(f − h), and its gradient:  dh = (1 − m)·g,  df = m·g,  dm = Σ g·(f − h).
//
// For |m| >= ½ the same value is f − (1 − m)·(f − h), so that m = 0 gives h and m = 1 gives f to the bit. The tensors are
// (rows, columns) without gaps; the gate holds one value a row or one an element.
#pragma once

#include <memory>

#include "kernels/block.h"

namespace e3::E3_ISA_NAMESPACE {

inline const float* fp32_block(const void* data, DType dtype, int64_t at, int count, float* scratch) {
  return load_block(Rows{dtype, data, 0}, 0, at, count, Transform{1.0f, 0.0f, 1.0f}, scratch);
}

// One block of a row: where it starts, in the row and in the tensor.
struct Stretch {
  int64_t row;
  int64_t block;
  int64_t at;
  int count;
};

template <class Body>
inline void for_each_stretch(const GatedResidual& problem, const Parallel& pool, const Body& body) {
  const int64_t blocks = (problem.columns + kBlock - 1) / kBlock;
  parallel_for(pool, problem.rows * blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / blocks, block = i % blocks, left = problem.columns - block * kBlock;
      body(Stretch{row, block, row * problem.columns + block * kBlock, static_cast<int>(left < kBlock ? left : kBlock)});
    }
    stream_fence();
  });
}

// The gate's values on a stretch.
class Gate {
 public:
  Gate(const GatedResidual& problem, const Stretch& stretch) : by_element_(problem.gate_by_element) {
    const int64_t at = by_element_ ? stretch.at : stretch.row;
    values_ = fp32_block(problem.gate, problem.gate_dtype, at, by_element_ ? stretch.count : 1, scratch_);
    value_ = broadcast(values_[0]);
  }
  Vf at(int i) const { return by_element_ ? load(values_ + i) : value_; }

 private:
  alignas(64) float scratch_[kRoom];
  const float* values_;
  Vf value_;
  bool by_element_;
};

inline Vf interpolate(Vf h, Vf f, Vf m) {
  const Vf delta = f - h;
  return select(Vi(max(m, -m) < 0.5f), Vf(h + m * delta), Vf(f - (1.0f - m) * delta));
}

inline void gated_residual(const GatedResidual& problem, const Parallel& pool, bool stream_out, void* out) {
  for_each_stretch(problem, pool, [&](const Stretch& stretch) {
    alignas(64) float hidden[kRoom], branch[kRoom], result[kRoom];
    const float* h = fp32_block(problem.hidden, problem.dtype, stretch.at, stretch.count, hidden);
    const float* f = fp32_block(problem.branch, problem.dtype, stretch.at, stretch.count, branch);
    const Gate gate(problem, stretch);
    for (int i = 0; i < padded(stretch.count); i += kLanes) {
      store(result + i, interpolate(load(h + i), load(f + i), gate.at(i)));
    }
    store_block(result, stretch.count, problem.dtype, stream_out, out, stretch.at);
  });
}

// Σ g·(f − h) of a stretch; the products go to `dm` where the gate has one value an element.
inline double gate_gradient(const float* g, const float* h, const float* f, int count, float* dm) {
  Vf sum{};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vf product = load(g + i) * (load(f + i) - load(h + i));
    if (dm != nullptr) store(dm + i, product);
    sum += product;
  }
  double total = horizontal_sum(sum);
  for (; i < count; ++i) {
    const float product = g[i] * (f[i] - h[i]);
    if (dm != nullptr) dm[i] = product;
    total += product;
  }
  return total;
}

// `grad_gate` is fp32, one value a row or an element; sums over a row are fp32 in a block, fp64 over blocks in their order.
inline void gated_residual_backward(const GatedResidual& problem, const void* grad, const Parallel& pool,
                                    bool stream_out, void* grad_hidden, void* grad_branch, float* grad_gate) {
  const int64_t blocks = (problem.columns + kBlock - 1) / kBlock;
  const std::unique_ptr<double[]> sums(new double[problem.rows * blocks]);
  for_each_stretch(problem, pool, [&](const Stretch& stretch) {
    alignas(64) float incoming[kRoom], hidden[kRoom], branch[kRoom], dh[kRoom], df[kRoom];
    const float* g = fp32_block(grad, problem.dtype, stretch.at, stretch.count, incoming);
    const float* h = fp32_block(problem.hidden, problem.dtype, stretch.at, stretch.count, hidden);
    const float* f = fp32_block(problem.branch, problem.dtype, stretch.at, stretch.count, branch);
    const Gate gate(problem, stretch);
    for (int i = 0; i < padded(stretch.count); i += kLanes) {
      store(dh + i, (1.0f - gate.at(i)) * load(g + i));
      store(df + i, gate.at(i) * load(g + i));
    }
    sums[stretch.row * blocks + stretch.block] =
        gate_gradient(g, h, f, stretch.count, problem.gate_by_element ? grad_gate + stretch.at : nullptr);
    store_block(dh, stretch.count, problem.dtype, stream_out, grad_hidden, stretch.at);
    store_block(df, stretch.count, problem.dtype, stream_out, grad_branch, stretch.at);
  });
  if (problem.gate_by_element) return;
  for (int64_t row = 0; row < problem.rows; ++row) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[row * blocks + block];
    grad_gate[row] = static_cast<float>(total);
  }
}

}  // namespace e3::E3_ISA_NAMESPACE
