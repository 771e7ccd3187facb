// Divergence of a student from a dense teacher, the teacher's entropy and the cross-entropy of a label, with gradient.
//
// For one token, x^s and x^t the transformed logits over the temperature, q and p their softmax:
//
//   Z = Σ e^{x−m}                     log q = x − m − log Z
//   H = log Z_t − A/Z_t               A = Σ e^{x^t−m_t}·(x^t−m_t)
//   forward  KL(p‖q) = B/Z_t − log Z_t + log Z_s        B = Σ e^{x^t−m_t}·((x^t−m_t) − (x^s−m_s))
//   reverse  KL(q‖p) = the same with the roles of s and t exchanged
//   adaptive α·forward + (1−α)·reverse,  α = H/log V        (no gradient through α: it is the teacher's)
//   jsd      β·KL(p‖μ) + (1−β)·KL(q‖μ),  μ = βp + (1−β)q            (a second sweep: μ needs both Z)
//
//   ∂forward/∂x^s = q − p
//   ∂reverse/∂x^s = q·(log q − log p − KL(q‖p))
//   ∂jsd/∂x^s     = (1−β)·q·(log q − log μ − KL(q‖μ))
//   ∂CE/∂f(z^s)   = softmax(f(z^s)) − onehot(label)
//
// The row pair is read from memory once. The gradient's sweep finds it in the cache, or, but for the jsd, finds there
// what it is a sum of: e^{x−m} of both and the student's times x^s − x^t.
#pragma once

#include "kernels/entropy_kl/gradient.h"
#include "kernels/entropy_kl/statistics.h"
#include "kernels/token_loss.h"

namespace e3::E3_ISA_NAMESPACE {

template <Divergence D>
class EntropyKlRows {
 public:
  using Statistics = KlStatistics;

  explicit EntropyKlRows(const EntropyKl& problem) : problem_(problem) {}

  int64_t columns() const { return problem_.vocabulary; }
  int64_t row_bytes() const { return problem_.vocabulary * size_of(problem_.student.dtype); }

  // What the gradient is a sum of, where it fits the cache.
  int64_t scratch_floats(bool need_grad) const {
    constexpr int64_t kKeptColumns = 1 << 18;
    const bool tempered = problem_.tokens.labels != nullptr && problem_.student_transform.temperature != 1.0f;
    const bool linear = D != Divergence::jsd && !tempered && problem_.student_transform.softcap <= 0;
    return need_grad && linear && problem_.vocabulary <= kKeptColumns ? KlRow::kept_floats<D>(problem_.vocabulary) : 0;
  }

  TeacherEntropy teacher_entropy(int64_t row, const RowContext& context) const {
    return KlStatisticsPass<D>({problem_, row, context}).teacher_entropy();
  }

  template <class Before>
  KlStatistics statistics(int64_t row, const RowContext& context, Before& before) const {
    return KlStatisticsPass<D>({problem_, row, context}).statistics(before);
  }

  KlGradientPass<D> gradient(int64_t row, const KlStatistics& s, const Coefficients& c, const RowContext& context,
                             bool stream_out, void* target) const {
    return {{problem_, row, context}, s, c, stream_out, target};
  }

 private:
  const EntropyKl& problem_;
};

template <class Body>
inline void with_divergence(const EntropyKl& problem, const Body& body) {
  switch (problem.divergence) {
    case Divergence::forward: return body(EntropyKlRows<Divergence::forward>(problem));
    case Divergence::reverse: return body(EntropyKlRows<Divergence::reverse>(problem));
    case Divergence::adaptive: return body(EntropyKlRows<Divergence::adaptive>(problem));
    case Divergence::jsd: return body(EntropyKlRows<Divergence::jsd>(problem));
  }
}

inline void entropy_kl(const EntropyKl& problem, const Parallel& pool, const LossOutput& out) {
  with_divergence(problem, [&](const auto& rows) { forward(rows, problem.objective, problem.tokens, pool, out); });
}

inline void entropy_kl_backward(const EntropyKl& problem, const Parallel& pool, const float* grad_loss, bool stream,
                                void* grad) {
  with_divergence(problem, [&](const auto& rows) {
    backward(rows, problem.objective, problem.tokens, pool, grad_loss, stream, grad);
  });
}

}  // namespace e3::E3_ISA_NAMESPACE
