// Divergence of a student from k stored log-probabilities of a teacher a token, with gradient.
//
// x = f(z)/T of the student, m a reference of its row, E = e^{x−m}. "Stored" are the ids whose log-probability is not
// −∞, each at its first place in the row; S is their number:
//
//   bucket     S + 1 events: the stored ids and all others;  p_rest = 1 − Σp,  q_rest = Σ_{not stored} E / Σ E
//   renorm     S events, both sides renormalised over the stored ids
//   truncated  Σ p(log p − log q) over the stored ids; not a divergence
//
// The adaptive divergence has α = H/log S of the stored probabilities, renormalised.
//
// With g_j = ∂D/∂log q_j of event j and G = Σ g_j:
//
//   ∂D/∂x_i = g_i − G·q_i            i stored
//           = g_rest·E_i/Σ_{not stored}E − G·E_i/ΣE     else (renorm: 0; truncated: g_rest = 0)
//
// The row is read once and stays in the cache for the gradient.
#pragma once

#include "kernels/token_loss.h"
#include "kernels/topk_kl/gradient.h"
#include "kernels/topk_kl/statistics.h"

namespace e3::E3_ISA_NAMESPACE {

class TopkKlRows {
 public:
  using Statistics = TopkStatistics;

  explicit TopkKlRows(const TopkKl& problem) : problem_(problem) {}

  int64_t columns() const { return problem_.vocabulary; }
  int64_t row_bytes() const { return problem_.vocabulary * size_of(problem_.student.dtype); }
  int64_t scratch_floats(bool need_grad) const { return TopkRow::scratch_floats(problem_, need_grad); }

  TeacherEntropy teacher_entropy(int64_t row, const RowContext& context) const {
    return TopkStatisticsPass({problem_, row, context}).teacher_entropy();
  }

  template <class Before>
  TopkStatistics statistics(int64_t row, const RowContext& context, Before& before) const {
    return TopkStatisticsPass({problem_, row, context}).statistics(before);
  }

  TopkGradientPass gradient(int64_t row, const TopkStatistics& s, const Coefficients& c, const RowContext& context,
                            bool stream_out, void* target) const {
    return {{problem_, row, context}, s, c, stream_out, target};
  }

 private:
  const TopkKl& problem_;
};

inline void topk_kl(const TopkKl& problem, const Parallel& pool, const LossOutput& out) {
  forward(TopkKlRows(problem), problem.objective, problem.tokens, pool, out);
}

inline void topk_kl_backward(const TopkKl& problem, const Parallel& pool, const float* grad_loss, bool stream,
                             void* grad) {
  backward(TopkKlRows(problem), problem.objective, problem.tokens, pool, grad_loss, stream, grad);
}

}  // namespace e3::E3_ISA_NAMESPACE
