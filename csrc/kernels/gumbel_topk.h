// k of L by perturbed scores s = θ + κ·g, and a relaxation p of the choice with Σp = k.
//
//   mask        ones at the k largest s, ties to the lower index
//   threshold   p = σ((s − c)/τ), Σp = k                     dθ_i = a_i/τ·(d_i − Σa·d/Σa), a = p(1 − p)
//   softmax     p = k·a, a = softmax(s/τ)                    dθ_i = k·a_i/τ·(d_i − Σa·d)
//   successive  p = Σ_j a^j, a^j = softmax(s^j/τ), s^{j+1} = s^j + log(1 − a^j)     (Xie & Ermon 2019)
//
// d is the incoming gradient. k = 0 and k = L: a constant mask, no gradient. Everything in fp64: rows are short.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "kernels/philox.h"
#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr double kInfinite = std::numeric_limits<double>::infinity();

// An infinite score counts as this many τ beyond the farthest finite one: σ and exp saturate exactly there.
inline constexpr double kInfiniteTaus = 1000.0;

// e^x for x <= 0: 2^n·Σ r^i/i! with |r| <= ln 2 / 2, relative error below 2e-15; 0 below −708.
inline Vd exp_negative(Vd x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5·2^52
  const Vd clamped = x < -708.0 ? Vd{} - 708.0 : x;
  const Vd shifted = clamped * 1.4426950408889634 + kMagic;
  const Vd n = shifted - kMagic;
  const Vd r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  Vd p = Vd{} + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const Vd power = bits_as<Vd>(Vl((bits_as<Vl>(shifted) + 1023) << 52));
  return x < -708.0 ? Vd{} : p * power;
}

inline Vd sigmoid(Vd x) {
  const Vl negative = x < 0.0;
  const Vd e = exp_negative(negative ? x : -x);
  return (negative ? e : Vd{} + 1.0) / (1.0 + e);
}

// The doubles that a row of `length` fills, in whole vectors.
inline int64_t padded_doubles(int64_t length) { return (length + kDoubles - 1) / kDoubles * kDoubles; }

// One row of scores and what is computed from it; buffers of padded_doubles(L) live as long as the row.
class GumbelRow {
 public:
  GumbelRow(const GumbelTopk& problem, double* scores)
      : k_(problem.k), length_(problem.length), tau_(problem.tau), s_(scores) {}

  // s = θ + κ·g; false if any is NaN.
  bool score(const GumbelTopk& problem, int64_t row) {
    if (problem.noise_scale != 0) gumbel_noise(problem.seed, problem.step, static_cast<uint32_t>(row), length_, s_);
    bool defined = true;
    with_dtype(problem.logits.dtype, [&](auto element) {
      using T = decltype(element);
      const T* theta = reinterpret_cast<const T*>(address(problem.logits, row, 0));
      for (int64_t i = 0; i < length_; ++i) {
        const double logit = load_one(theta + i * problem.column_stride);
        s_[i] = problem.noise_scale != 0 ? logit + s_[i] * problem.noise_scale : logit;
        defined &= !std::isnan(s_[i]);
      }
    });
    return defined;
  }

  // The k-th and the (k+1)-th largest score, 0 < k < L; `work` is scratch.
  void select(double* work) {
    std::copy(s_, s_ + length_, work);
    std::nth_element(work, work + (k_ - 1), work + length_, [](double a, double b) { return a > b; });
    kept_ = work[k_ - 1];
    next_ = *std::max_element(work + k_, work + length_, [](double a, double b) { return a < b; });
  }

  void mask(double* out) const {
    int64_t ties = k_;
    for (int64_t i = 0; i < length_; ++i) ties -= s_[i] > kept_;
    for (int64_t i = 0; i < length_; ++i) {
      const bool chosen = s_[i] > kept_ || (s_[i] == kept_ && ties-- > 0);
      out[i] = chosen ? 1.0 : 0.0;
    }
  }

  // Infinite scores, and the two that select found, become finite.
  void make_finite() {
    double high = -kInfinite, low = kInfinite;
    for (int64_t i = 0; i < length_; ++i) {
      if (!std::isfinite(s_[i])) continue;
      high = s_[i] > high ? s_[i] : high;
      low = s_[i] < low ? s_[i] : low;
    }
    high = std::isfinite(high) ? high : 0.0;
    low = std::isfinite(low) ? low : 0.0;
    const auto finite = [&](double s) {
      return s == kInfinite ? high + kInfiniteTaus * tau_ : s == -kInfinite ? low - kInfiniteTaus * tau_ : s;
    };
    for (int64_t i = 0; i < length_; ++i) s_[i] = finite(s_[i]);
    kept_ = finite(kept_);
    next_ = finite(next_);
  }

  // Σσ(x − d) = k for d by Newton's method inside a bracket, x in units of τ around the middle of kept and next: the
  // root lies in [−log 2k, log 2(L − k)] however far the two are apart. The scores are used up.
  void threshold(double* p) {
    const double middle = kept_ / 2 + next_ / 2;
    for (int64_t i = 0; i < length_; ++i) s_[i] = (s_[i] - middle) / tau_;
    pad(s_);
    double d = 0, low = -std::log(2.0 * k_), high = std::log(2.0 * (length_ - k_));
    for (int step = 0; step < 60; ++step) {
      Vd sums{}, slopes{};
      for (int64_t i = 0; i < length_; i += kDoubles) {
        const Vd value = sigmoid(load_raw<Vd>(s_ + i) - d);
        store_raw(p + i, value);
        sums += value;
        slopes += value * (1.0 - value);
      }
      const double excess = horizontal_sum(sums) - k_;
      (excess > 0 ? low : high) = d;
      const double newton = d + excess / horizontal_sum(slopes);
      const double moved = newton >= low && newton <= high ? newton : low / 2 + high / 2;
      if (std::fabs(moved - d) <= 1e-14 * (1.0 + std::fabs(d))) return;
      d = moved;
    }
  }

  // a = softmax(s/τ).
  void softmax(double* a) {
    const double high = *std::max_element(s_, s_ + length_, [](double x, double y) { return x < y; });
    pad(s_);
    Vd sums{};
    for (int64_t i = 0; i < length_; i += kDoubles) {
      const Vd value = exp_negative((load_raw<Vd>(s_ + i) - high) / tau_);
      store_raw(a + i, value);
      sums += value;
    }
    const double sum = horizontal_sum(sums);
    for (int64_t i = 0; i < length_; ++i) a[i] /= sum;
  }

  // The k softmaxes one after the other, (k, padded L); the scores are used up.
  void successive(double* steps) {
    for (int64_t j = 0; j < k_; ++j, steps += padded_doubles(length_)) {
      softmax(steps);
      for (int64_t i = 0; i < length_; ++i) s_[i] += std::log1p(-steps[i]);
    }
  }

 private:
  // Lanes past the end have no share in any sum.
  void pad(double* row) const { std::fill(row + length_, row + padded_doubles(length_), -kInfinite); }

  int64_t k_, length_;
  double tau_;
  double* s_;
  double kept_ = 0, next_ = 0;
};

inline void store_row(const GumbelTopk& problem, const double* values, double factor, void* target, int64_t row) {
  with_dtype(problem.logits.dtype, [&](auto element) {
    auto* out = static_cast<decltype(element)*>(target) + row * problem.length;
    for (int64_t i = 0; i < problem.length; ++i) store_one(out + i, static_cast<float>(values[i] * factor));
  });
}

inline int64_t steps_of(const GumbelTopk& problem) {
  return problem.relaxation == Relaxation::successive ? problem.k : 1;
}

// One row of mask and probs; `work` holds 2 + steps padded rows.
inline void gumbel_topk_row(const GumbelTopk& problem, int64_t row, double* work, void* mask, void* probs) {
  const int64_t length = problem.length, padded = padded_doubles(length);
  double *scores = work, *chosen = work + padded, *relaxed = work + 2 * padded;
  GumbelRow sample(problem, scores);
  const bool constant = problem.k == 0 || problem.k == length;
  if (!sample.score(problem, row)) {
    std::fill(chosen, chosen + length, std::numeric_limits<double>::quiet_NaN());
  } else if (constant) {
    std::fill(chosen, chosen + length, problem.k == 0 ? 0.0 : 1.0);
  } else {
    sample.select(relaxed);
    sample.mask(chosen);
    store_row(problem, chosen, 1.0, mask, row);
    sample.make_finite();
    if (problem.relaxation == Relaxation::threshold) sample.threshold(relaxed);
    if (problem.relaxation == Relaxation::softmax) sample.softmax(relaxed);
    if (problem.relaxation == Relaxation::successive) {
      sample.successive(relaxed);
      for (int64_t j = 1; j < problem.k; ++j) {
        for (int64_t i = 0; i < length; ++i) relaxed[i] += relaxed[j * padded + i];
      }
    }
    return store_row(problem, relaxed, problem.relaxation == Relaxation::softmax ? problem.k : 1.0, probs, row);
  }
  store_row(problem, chosen, 1.0, mask, row);
  store_row(problem, chosen, 1.0, probs, row);
}

// a·(d − Σa·d/Σa) in place of d; Σa = 0 (a saturated sample) gives 0.
inline void centre(const double* a, int64_t length, bool normalised, double factor, double* d) {
  double total = normalised ? 1.0 : 0.0, mean = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (!normalised) total += a[i];
    mean += a[i] * d[i];
  }
  mean /= total == 0 ? 1.0 : total;
  for (int64_t i = 0; i < length; ++i) d[i] = a[i] * (d[i] - mean) * factor;
}

// Reverse sweep over the k softmaxes: `state` is the gradient of s^{j+1} before step j and of s^j after it.
inline void successive_backward(const double* steps, int64_t k, int64_t length, double tau, const double* d,
                                double* inner, double* state) {
  std::fill(state, state + length, 0.0);
  for (int64_t j = k - 1; j >= 0; --j) {
    const double* a = steps + j * padded_doubles(length);
    for (int64_t i = 0; i < length; ++i) inner[i] = d[i] - (a[i] < 1.0 ? state[i] / (1.0 - a[i]) : 0.0);
    centre(a, length, true, 1.0 / tau, inner);
    for (int64_t i = 0; i < length; ++i) state[i] += inner[i];
  }
}

// One row of the gradient of θ; `work` holds 4 + steps padded rows.
inline void gumbel_topk_backward_row(const GumbelTopk& problem, const GumbelIncoming& incoming, int64_t row,
                                     double* work, void* grad_logits) {
  const int64_t length = problem.length, padded = padded_doubles(length);
  double *d = work, *p = work + padded, *inner = work + 2 * padded, *state = work + 3 * padded;
  double* steps = work + 4 * padded;
  with_dtype(problem.logits.dtype, [&](auto element) {
    using T = decltype(element);
    const T* grad = static_cast<const T*>(incoming.grad) + row * length;
    const T* probs = static_cast<const T*>(incoming.probs) + row * length;
    for (int64_t i = 0; i < length; ++i) {
      d[i] = load_one(grad + i);
      p[i] = load_one(probs + i);
    }
  });
  if (problem.relaxation == Relaxation::threshold) {
    for (int64_t i = 0; i < length; ++i) p[i] *= 1.0 - p[i];
    centre(p, length, false, 1.0 / problem.tau, d);
  } else if (problem.relaxation == Relaxation::softmax) {
    for (int64_t i = 0; i < length; ++i) p[i] /= static_cast<double>(problem.k);
    centre(p, length, true, static_cast<double>(problem.k) / problem.tau, d);
  } else {
    GumbelRow sample(problem, inner);
    sample.score(problem, row);
    sample.select(state);
    sample.make_finite();
    sample.successive(steps);
    successive_backward(steps, problem.k, length, problem.tau, d, inner, state);
    std::copy(state, state + length, d);
  }
  store_row(problem, d, 1.0, grad_logits, row);
}

// mask and probs: contiguous, of the logits' shape and dtype.
inline void gumbel_topk(const GumbelTopk& problem, const Parallel& pool, void* mask, void* probs) {
  const int64_t grain = 1 + (int64_t{1} << 12) / (problem.length * steps_of(problem) + 1);
  parallel_for(pool, problem.rows, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<double[]> work(new double[(2 + steps_of(problem)) * padded_doubles(problem.length)]);
    for (int64_t row = first; row < last; ++row) gumbel_topk_row(problem, row, work.get(), mask, probs);
  });
}

// 0 < k < L: the caller returns zeros otherwise.
inline void gumbel_topk_backward(const GumbelTopk& problem, const GumbelIncoming& incoming, const Parallel& pool,
                                 void* grad_logits) {
  const int64_t grain = 1 + (int64_t{1} << 12) / (problem.length * steps_of(problem) + 1);
  parallel_for(pool, problem.rows, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<double[]> work(new double[(4 + steps_of(problem)) * padded_doubles(problem.length)]);
    for (int64_t row = first; row < last; ++row) {
      gumbel_topk_backward_row(problem, incoming, row, work.get(), grad_logits);
    }
  });
}

}  // namespace e3::E3_ISA_NAMESPACE
