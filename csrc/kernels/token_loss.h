// What entropy_kl and topk_kl share: from the statistics of each token to the loss, and back to coefficients of a
// gradient.
//
//   loss = Σ_r (a_r·D_r + b_r·CE_r) / norm        r over the valid tokens
//   none, entropy, inverse:  a = w·λT²,  b = w·(1−λ),  w = 1,  1 + γ·h,  1 + γ·(1 − h)
//   mix:                     a = h·T²,   b = 1 − h,    w = 1
//   h = H/log S in [0, 1], H the teacher's entropy, S its support (h = 0 where S <= 1);  norm = Σw, num_items or 1
#pragma once

#include <cstring>
#include <memory>

#include "kernels/token_rows.h"

namespace e3::E3_ISA_NAMESPACE {

inline Coefficients coefficients(const Objective& objective, const TeacherEntropy& entropy) {
  const double h = entropy.share();
  const double squared = objective.temperature * objective.temperature;
  if (objective.weighting == Weighting::mix) return {1.0, h * squared, 1.0 - h, h != 0.0};
  double weight = 1.0;
  if (objective.weighting == Weighting::entropy) weight = 1.0 + term(objective.gamma, h);
  if (objective.weighting == Weighting::inverse) weight = 1.0 + term(objective.gamma, 1.0 - h);
  const double divergence = weight * objective.kd_ratio * squared;
  return {weight, divergence, weight * (1.0 - objective.kd_ratio), divergence != 0.0};
}

inline bool weighted_by_entropy(const Objective& objective) {
  const Weighting kind = objective.weighting;
  return (kind == Weighting::entropy || kind == Weighting::inverse) && objective.gamma != 0.0;
}

inline double total(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// What the sum of the losses is divided by; 0 counts as 1, so that the loss without a valid token is 0.
inline double denominator(const Objective& objective, const double* weights, int64_t count) {
  if (objective.reduction != Reduction::mean) return 1.0;
  const double norm = objective.num_items != nullptr ? *objective.num_items : total(weights, count);
  return norm == 0.0 ? 1.0 : norm;
}

// The denominator before the first gradient is written. Where w depends on the teacher's entropies, they cost one more
// read of the teacher, first row first: what it leaves in the cache are the rows that for_each_row takes first.
template <class Op>
double denominator_ahead(const Op& op, const Objective& objective, const Tokens& tokens, const Parallel& pool) {
  const std::unique_ptr<double[]> weights(new double[tokens.count]());
  if (objective.reduction == Reduction::mean && objective.num_items == nullptr) {
    const bool by_entropy = weighted_by_entropy(objective);
    const auto body = [&](int64_t reversed, const RowContext& context, Stateless&) {
      const int64_t row = tokens.count - 1 - reversed;
      if (!tokens.valid(row)) return;
      weights[row] = by_entropy ? coefficients(objective, op.teacher_entropy(row, context)).weight : 1.0;
    };
    for_each_row<Stateless>(tokens.count, pool, op.scratch_floats(false), false, body);
  }
  return denominator(objective, weights.get(), tokens.count);
}

inline void reduce(const Objective& objective, const double* losses, const double* weights, int64_t count,
                   float* loss) {
  if (objective.reduction == Reduction::none) {
    for (int64_t row = 0; row < count; ++row) loss[row] = static_cast<float>(losses[row]);
    return;
  }
  *loss = static_cast<float>(total(losses, count) / denominator(objective, weights, count));
}

// Value, statistics and, if out.grad is set, the gradient of the reduced loss with respect to the student's logits.
// Op has: Statistics (with TokenStats values), statistics(row, context, before), which calls before(begin, count) ahead
// of each block's sums, or before.finish() if it takes none, teacher_entropy(row, context), columns(), row_bytes(),
// scratch_floats(need_grad), and gradient(row, statistics, coefficients, context, stream, target), which gives
// body(begin, count) for a block.
template <class Op>
void forward(const Op& op, const Objective& objective, const Tokens& tokens, const Parallel& pool,
             const LossOutput& out) {
  const int64_t count = tokens.count;
  const std::unique_ptr<double[]> losses(new double[count]()), weights(new double[count]());
  const bool need_grad = out.grad != nullptr;
  const double norm = need_grad ? denominator_ahead(op, objective, tokens, pool) : 1.0;
  const auto body = [&](int64_t row, const RowContext& context, Deferred<Op>& before) {
    char* target = out.grad == nullptr ? nullptr : static_cast<char*>(out.grad) + row * op.row_bytes();
    float* stats = out.stats + row;
    if (!tokens.valid(row)) {
      for (int i = 0; i < 4; ++i) stats[i * count] = 0.0f;
      if (target != nullptr) std::memset(target, 0, op.row_bytes());
      return;
    }
    const typename Op::Statistics statistics = op.statistics(row, context, before);
    const TokenStats& values = statistics.values;
    Coefficients c = coefficients(objective, values.teacher_entropy);
    losses[row] = term(c.divergence, values.divergence) + term(c.cross_entropy, values.cross_entropy);
    weights[row] = c.weight;
    stats[0] = static_cast<float>(values.divergence);
    stats[count] = static_cast<float>(values.teacher_entropy.value);
    stats[2 * count] = static_cast<float>(values.cross_entropy);
    stats[3 * count] = static_cast<float>(c.weight);
    if (target == nullptr) return;
    c.divergence /= norm;
    c.cross_entropy /= norm;
    before.put(op.gradient(row, statistics, c, context, out.stream, target), op.columns(), context.pool);
  };
  for_each_row<Deferred<Op>>(count, pool, op.scratch_floats(need_grad), need_grad, body);
  reduce(objective, losses.get(), weights.get(), count, out.loss);
}

// The gradient for one incoming gradient a token: statistics are taken again, the row staying in cache.
template <class Op>
void backward(const Op& op, const Objective& objective, const Tokens& tokens, const Parallel& pool,
              const float* grad_loss, bool stream, void* grad) {
  const auto body = [&](int64_t row, const RowContext& context, Deferred<Op>& before) {
    char* target = static_cast<char*>(grad) + row * op.row_bytes();
    if (!tokens.valid(row)) {
      std::memset(target, 0, op.row_bytes());
      return;
    }
    const typename Op::Statistics statistics = op.statistics(row, context, before);
    Coefficients c = coefficients(objective, statistics.values.teacher_entropy);
    c.divergence *= grad_loss[row];
    c.cross_entropy *= grad_loss[row];
    before.put(op.gradient(row, statistics, c, context, stream, target), op.columns(), context.pool);
  };
  for_each_row<Deferred<Op>>(tokens.count, pool, op.scratch_floats(true), true, body);
}

}  // namespace e3::E3_ISA_NAMESPACE
