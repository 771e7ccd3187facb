// How a loss walks over its tokens: rows over the threads, the gradient of one beside the sums of the next.
#pragma once

#include <cmath>
#include <optional>
#include <utility>

#include "kernels/problem.h"
#include "simd/block.h"
#include "simd/parallel.h"
#include "simd/scratch.h"

namespace e3::E3_ISA_NAMESPACE {

// coefficient·value, 0 where the coefficient is 0 even if the value is infinite or NaN.
inline double term(double coefficient, double value) { return coefficient == 0.0 ? 0.0 : coefficient * value; }

// H, and the number S of outcomes that it is over.
struct TeacherEntropy {
  double value;
  int64_t support;

  // H/log S in [0, 1], 0 where S <= 1; NaN stays.
  double share() const {
    const double h = support > 1 ? value / std::log(static_cast<double>(support)) : 0.0;
    return h < 0.0 ? 0.0 : h > 1.0 ? 1.0 : h;
  }
};

struct TokenStats {
  double divergence;
  TeacherEntropy teacher_entropy;
  double cross_entropy;
};

// `divergent`: the divergence counts, whatever the incoming gradient that its coefficient is multiplied by.
struct Coefficients {
  double weight;
  double divergence;
  double cross_entropy;
  bool divergent;
};

inline constexpr Parallel kSerial{1, nullptr};

// What a pass over one row works with: the threads inside the row, the row that is read next, fp32 scratch.
struct RowContext {
  Parallel pool;
  int64_t next;
  float* scratch;
  bool keep;  // a gradient follows: what it needs of the row is kept in the scratch
};

// Rows over the threads, the last first; where there are fewer rows than threads, one row at a time with the threads
// inside it. Both give the same bits: a row is always cut into the same blocks and its partial sums meet in the same
// order. body(row, context, state) with a `State` that the rows of one thread share and that is finished after them.
template <class State, class Body>
inline void for_each_row(int64_t rows, const Parallel& pool, int64_t scratch_floats, bool keep, const Body& body) {
  const auto run = [&](int64_t first, int64_t last, const Parallel& inside) {
    const FlushSubnormals guard;
    const Scratch scratch = new_scratch(scratch_floats);
    State state;
    for (int64_t row = last; row-- > first;) {
      body(row, RowContext{inside, row > first ? row - 1 : row, scratch.get(), keep}, state);
    }
    state.finish();
    stream_fence();
  };
  if (rows < pool.threads) return run(0, rows, pool);
  parallel_for(pool, rows, 1, [&](int64_t first, int64_t last) { run(first, last, kSerial); });
}

struct Stateless {
  void finish() {}
};

// The gradient of a row, taken block by block while the next row is summed, each block just before that row's takes its
// place in the scratch: what it writes drains while the sums compute.
template <class Op>
class Deferred {
 public:
  using Gradient = decltype(std::declval<const Op&>().gradient(0, std::declval<const typename Op::Statistics&>(),
                                                               Coefficients{}, RowContext{}, false, nullptr));

  void put(const Gradient& gradient, int64_t columns, const Parallel& inside) {
    if (inside.threads > 1) return for_each_block(inside, columns, gradient);
    gradient_.emplace(gradient);
    columns_ = columns;
  }
  void operator()(int64_t begin, int count) const {
    if (gradient_) (*gradient_)(begin, count);
  }
  void finish() {
    if (gradient_) for_each_block(kSerial, columns_, *gradient_);
    gradient_.reset();
  }

 private:
  std::optional<Gradient> gradient_;
  int64_t columns_ = 0;
};

}  // namespace e3::E3_ISA_NAMESPACE
