// The gradient of one token's loss with respect to its row of the student's logits, one block at a time.
#pragma once

#include "kernels/topk_kl/statistics.h"

namespace e3::E3_ISA_NAMESPACE {

class TopkGradientPass {
 public:
  TopkGradientPass(const TopkRow& row, const TopkStatistics& s, const Coefficients& c, bool stream_out, void* target)
      : row_(row),
        c_(c),
        stream_out_(stream_out),
        target_(target),
        a_(c.divergence / row.temperature()),
        labelled_(row.labelled() && c.cross_entropy != 0.0),
        together_(labelled_ && row.temperature() == 1.0f),
        reference_(s.sums.rest != 0 ? s.sums.reference : 0.0) {
    const bool divergent = row.problem.tail != Tail::renorm && c.divergent, any = s.sums.rest != 0;
    const double q = any ? std::exp(s.norm.log_share(s.sums.reference)) : 0.0;
    hard_ = labelled_ && any ? c.cross_entropy * std::exp(s.label_norm.log_share(s.sums.reference)) : 0.0;
    const double rest = divergent && any ? a_ * (s.rest_slope / s.sums.rest - s.slope_sum * q) : 0.0;
    common_ = rest + (together_ ? hard_ : 0.0);
    kept_ = row.keeps() && s.sums.plain && std::fabs(1.0 / common_) < 1e30;
  }

  void operator()(int64_t begin, int count) const {
    const TopkKl& problem = row_.problem;
    const int64_t label = labelled_ ? row_.label() - begin : -1;
    const bool labelled_here = label >= 0 && label < count;
    if (kept_) return from_kept(begin, count, labelled_here ? label : -1);
    alignas(64) float scratch[kRoom], g[kRoom];
    const float* x = row_.student(begin, count, scratch);
    if (row_.full()) {
      exponential_gradient(x, padded(count), reference_, 1.0f, static_cast<float>(common_), false, g);
    } else {
      std::memset(g, 0, sizeof(float) * count);
    }
    if (labelled_ && !together_) {
      exponential_gradient(x, padded(count), reference_, row_.temperature(), static_cast<float>(hard_), true, g);
    }
    put_stored(begin, count, 1.0, g);
    if (labelled_here) g[label] -= static_cast<float>(c_.cross_entropy);
    transform_gradient(x, count, problem.transform, g);
    store_block(g, count, problem.student.dtype, stream_out_, target_, begin);
  }

 private:
  // Stored ids and the label, which differ, are put in as multiples of what the kept exponentials are multiplied by.
  void from_kept(int64_t begin, int count, int64_t label) const {
    const double unit = 1.0 / common_;
    float* e = row_.exponentials() + begin;
    put_stored(begin, count, unit, e);
    if (label >= 0) e[label] -= static_cast<float>(c_.cross_entropy * unit);
    const float factor = static_cast<float>(common_ * row_.problem.transform.scale);
    store_values(count, row_.problem.student.dtype, stream_out_, target_, begin,
                 [=](int i) { return load(e + i) * factor; });
  }

  // Sets g at the stored ids of a block, in units of `unit`: the slopes, and the softmax that `log_student` has become.
  void put_stored(int64_t begin, int count, double unit, float* g) const {
    const double a = a_ * unit, b = c_.cross_entropy * unit;
    for (int64_t j = 0; j < row_.problem.k; ++j) {
      const int64_t column = row_.id(j) - begin;
      if (column < 0 || column >= count || row_.log_teacher()[j] == -INFINITY) continue;
      const double slope = c_.divergent ? a * row_.slopes()[j] : 0.0;
      g[column] = static_cast<float>(slope + (labelled_ ? b * row_.log_student()[j] : 0.0));
    }
  }

  const TopkRow row_;
  const Coefficients c_;
  const bool stream_out_;
  void* const target_;
  const double a_;
  const bool labelled_, together_;  // the softmax of the cross-entropy at T = 1 is q
  const Rounded reference_;
  double hard_, common_;  // what E is multiplied by: for the cross-entropy, and in all
  bool kept_;
};

}  // namespace e3::E3_ISA_NAMESPACE
