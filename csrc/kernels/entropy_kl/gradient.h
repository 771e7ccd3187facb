// The gradient of one token's loss with respect to its row of the student's logits, one block at a time.
#pragma once

#include "kernels/entropy_kl/statistics.h"

namespace e3::E3_ISA_NAMESPACE {

template <Divergence D>
class KlGradientPass {
 public:
  KlGradientPass(const KlRow& row, const KlStatistics& s, const Coefficients& c, bool stream_out, void* target)
      : row_(row), problem_(row.problem), s_(s), c_(c), stream_out_(stream_out), target_(target) {}

  void operator()(int64_t begin, int count) const {
    if (s_.kept) return from_kept(begin, count);
    alignas(64) float student[kRoom], teacher[kRoom], g[kRoom];
    const float *xs = row_.student(begin, count, student), *xt = row_.teacher(begin, count, teacher);
    if (c_.divergent) {
      divergence(xs, xt, padded(count), g);
    } else {
      std::memset(g, 0, sizeof g);
    }
    label(xs, begin, count, g);
    transform_gradient(xs, count, problem_.student_transform, g);
    store_block(g, count, problem_.student.dtype, stream_out_, target_, begin);
  }

 private:
  // What e^{x^s−m_s}, e^{x^t−m_t} and the student's times the surplus in bits are multiplied by. With T = 1 or without
  // labels the cross-entropy's softmax is q and joins in.
  struct Slopes {
    float student;
    float teacher;
    float surplus;
  };

  Slopes slopes() const {
    const double a = c_.divergence / row_.temperature();
    const double b = row_.labelled() && !row_.untempered() ? c_.cross_entropy : 0.0;
    const double forward = a * s_.share, reverse = a * (1.0 - s_.share);
    double of_q = forward + b;
    if constexpr (has_reverse(D)) {
      // log q − log p is the surplus in nats and log Z_t − log Z_s.
      of_q += reverse * (std::log(s_.sums.teacher_sum) - std::log(s_.sums.student_sum) - s_.reverse);
    }
    return {static_cast<float>(of_q / s_.sums.student_sum), static_cast<float>(forward / s_.sums.teacher_sum),
            static_cast<float>(reverse / (kBitsPerNat * s_.sums.student_sum))};
  }

  // From the kept terms straight to the result; the label's element is written again, less the one-hot.
  void from_kept(int64_t begin, int count) const {
    const Slopes slope = slopes();
    const float scale = problem_.student_transform.scale;
    const float student = slope.student * scale, teacher = -slope.teacher * scale, surplus = slope.surplus * scale;
    const Kept kept = row_.kept<D>(begin);
    const auto value = [=](int i) {
      Vf rest{};
      if constexpr (has_forward(D)) rest = load(kept.teacher + i) * teacher;
      if constexpr (has_reverse(D)) rest = fma(load(kept.surplus + i), broadcast(surplus), rest);
      return fma(load(kept.student + i), broadcast(student), rest);
    };
    store_values(count, problem_.student.dtype, stream_out_, target_, begin, value);
    const int64_t label = row_.labelled() ? row_.label() - begin : -1;
    if (label < 0 || label >= count) return;
    const float hard = static_cast<float>(c_.cross_entropy) * scale;
    const auto at_label = [&](int) { return value(static_cast<int>(label)) - hard; };
    store_values(1, problem_.student.dtype, false, target_, begin + label, at_label);
  }

  void divergence(const float* xs, const float* xt, int count, float* g) const {
    if constexpr (D == Divergence::forward) {
      const Slopes slope = slopes();
      const Rounded ms(s_.sums.student_reference), mt(s_.sums.teacher_reference);
      const float student = slope.student * ms.factor(), teacher = -slope.teacher * mt.factor();
      for (int i = 0; i < count; i += kLanes) {
        const Vf es = exp(load(xs + i) - ms.value), et = exp(load(xt + i) - mt.value);
        store(g + i, fma(es, broadcast(student), et * teacher));
      }
    } else {
      const Mixing by = mixing(row_, s_.sums);
      const double a = c_.divergence / row_.temperature();
      const float forward = static_cast<float>(a * s_.share);
      const float slope = static_cast<float>(a * (has_reverse(D) ? 1.0 - s_.share : 1.0 - problem_.beta));
      const float mean = static_cast<float>(has_reverse(D) ? s_.reverse : s_.mixture.student);
      for (int i = 0; i < count; i += kLanes) {
        const Mixture m(load(xs + i), load(xt + i), by);
        const Vf other = has_reverse(D) ? m.log_p : m.log_mu;
        Vf value = select(Vi(m.q == 0.0f), Vf{}, Vf(slope * m.q * (m.log_q - other - mean)));
        if constexpr (has_forward(D)) value += forward * (m.q - m.p);
        store(g + i, value);
      }
    }
  }

  // Adds the cross-entropy's softmax, where it is not q already, and its −1 at the label.
  void label(const float* xs, int64_t begin, int count, float* g) const {
    if (!row_.labelled() || c_.cross_entropy == 0.0) return;
    if (row_.untempered() || D != Divergence::forward || !c_.divergent) {
      const float temperature = row_.temperature();
      const Rounded ms(s_.sums.student_reference);
      const float slope = static_cast<float>(c_.cross_entropy / s_.sums.label_sum) * ms.factor(temperature);
      for (int i = 0; i < count; i += kLanes) {
        store(g + i, fma(exp((load(xs + i) - ms.value) * temperature), broadcast(slope), load(g + i)));
      }
    }
    const int64_t column = row_.label() - begin;
    if (column >= 0 && column < count) g[column] -= static_cast<float>(c_.cross_entropy);
  }

  const KlRow row_;
  const EntropyKl& problem_;
  const KlStatistics s_;
  const Coefficients c_;
  const bool stream_out_;
  void* const target_;
};

}  // namespace e3::E3_ISA_NAMESPACE
