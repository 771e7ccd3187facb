// The sums of a block of both models' logits, and how sums of blocks join.
//
// Terms are centred: the raw Σp·z would cancel. The reference m of a row is the maximum of its first values, so that
// the sums of all blocks add up as they are; a block for which that reference is too low (overflow), or that holds −∞,
// is summed anew relative to its own maximum, and so are all blocks where the reference is too large to be exact.
// Blocks are summed in fp32 and joined in fp64, in their order.
//
// The plain sums have their exponents in bits, y = (x − m)·log2 e, so that A and B come out as multiples of log2 e.
#pragma once

#include "kernels/problem.h"
#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

// What one distribution, whom the expectation is over, has beyond another.
struct Cross {
  double sum = 0;  // B, or B with the roles exchanged
  double exposed = -INFINITY;  // the largest logit of the one where the other has −∞
};

// Sums of one or more blocks relative to references m.
struct KlSums {
  double student_reference = -INFINITY;
  double teacher_reference = -INFINITY;
  double student_sum = 0;
  double teacher_sum = 0;
  double teacher_energy = 0;  // A
  Cross forward;  // of the teacher beyond the student
  Cross reverse;  // of the student beyond the teacher
  double label_sum = 0;  // Σ e^{T·(x^s−m_s)}
  bool plain = true;  // no block needed a reference of its own
};
struct References {
  float student;
  float teacher;
};

struct Shift {
  double by;  // m − m', <= 0
  double factor;  // e^by
};

// Empty sums (every logit −∞) have no reference to move.
inline Shift shift(double sum, double from, double to) {
  return sum == 0 || from == to ? Shift{0.0, 1.0} : Shift{from - to, std::exp(from - to)};
}

// Moves the sums to other references.
template <Divergence D>
void rebase(KlSums& sums, double student_reference, double teacher_reference, double temperature) {
  const Shift student = shift(sums.student_sum, sums.student_reference, student_reference);
  const Shift teacher = shift(sums.teacher_sum, sums.teacher_reference, teacher_reference);
  if constexpr (has_forward(D)) {
    sums.forward.sum = teacher.factor * (sums.forward.sum + sums.teacher_sum * (teacher.by - student.by));
  }
  if constexpr (has_reverse(D)) {
    sums.reverse.sum = student.factor * (sums.reverse.sum + sums.student_sum * (student.by - teacher.by));
  }
  sums.teacher_energy = teacher.factor * (sums.teacher_energy + sums.teacher_sum * teacher.by);
  sums.teacher_sum *= teacher.factor;
  sums.student_sum *= student.factor;
  sums.label_sum *= std::exp(temperature * student.by);
  sums.student_reference = student_reference;
  sums.teacher_reference = teacher_reference;
}

template <Divergence D>
void join(KlSums& total, KlSums part, double temperature) {
  if (total.student_reference != part.student_reference || total.teacher_reference != part.teacher_reference) {
    const double student = std::fmax(total.student_reference, part.student_reference);
    const double teacher = std::fmax(total.teacher_reference, part.teacher_reference);
    rebase<D>(total, student, teacher, temperature);
    rebase<D>(part, student, teacher, temperature);
  }
  total.student_sum += part.student_sum;
  total.teacher_sum += part.teacher_sum;
  total.teacher_energy += part.teacher_energy;
  for (Cross KlSums::* cross : {&KlSums::forward, &KlSums::reverse}) {
    (total.*cross).sum += (part.*cross).sum;
    (total.*cross).exposed = std::fmax((total.*cross).exposed, (part.*cross).exposed);
  }
  total.label_sum += part.label_sum;
  total.plain &= part.plain;
}

// Running sums of one chain of lanes.
struct Lanes {
  Vf student{}, teacher{}, energy{}, forward{}, reverse{};
};

// Lanes whose exponents are in units of which `unit` make a nat.
inline KlSums folded(const Lanes (&lanes)[2], double student_reference, double teacher_reference, double unit) {
  KlSums sums;
  sums.student_reference = student_reference;
  sums.teacher_reference = teacher_reference;
  sums.student_sum = horizontal_sum(lanes[0].student + lanes[1].student);
  sums.teacher_sum = horizontal_sum(lanes[0].teacher + lanes[1].teacher);
  sums.teacher_energy = horizontal_sum(lanes[0].energy + lanes[1].energy) / unit;
  sums.forward.sum = horizontal_sum(lanes[0].forward + lanes[1].forward) / unit;
  sums.reverse.sum = horizontal_sum(lanes[0].reverse + lanes[1].reverse) / unit;
  return sums;
}

template <class T>
KlSums sum_teacher(const T* xt, int count, float first, Prefetch ahead) {
  const Reference<T> m(first);
  Lanes lanes[2];
  for (int i = 0; i < count; i += kStep) {
    ahead.step();
    for (int chain = 0; chain < 2; ++chain) {
      const Vf y = m.bits_above(load(xt + i + chain * kLanes)), e = exp2<T>(y);
      lanes[chain].teacher += e;
      lanes[chain].energy = fma(e, y, lanes[chain].energy);
    }
  }
  return folded(lanes, 0.0, m.value(), kBitsPerNat);
}

// Where a block's terms are kept for the gradient, each one that the divergence has: the exponentials of both models
// and the student's times its surplus over the teacher, y^s − y^t.
struct Kept {
  float* student;
  float* teacher;
  float* surplus;
};

// What is read next of both models.
struct Ahead {
  Prefetch student;
  Prefetch teacher;
};

template <Divergence D, bool kKeep, class T>
KlSums sum_block(const T* student, const T* teacher, int count, References first, Ahead ahead, Kept kept) {
  const Reference<T> ms(first.student), mt(first.teacher);
  Lanes lanes[2];
  for (int i = 0; i < count; i += kStep) {
    ahead.student.step();
    ahead.teacher.step();
    for (int chain = 0; chain < 2; ++chain) {
      const int at = i + chain * kLanes;
      const Vf ys = ms.bits_above(load(student + at)), yt = mt.bits_above(load(teacher + at));
      const Vf es = exp2<T>(ys), et = exp2<T>(yt);
      lanes[chain].student += es;
      lanes[chain].teacher += et;
      lanes[chain].energy = fma(et, yt, lanes[chain].energy);
      if constexpr (kKeep) store(kept.student + at, es);
      if constexpr (has_forward(D)) {
        lanes[chain].forward = fma(et, yt - ys, lanes[chain].forward);
        if constexpr (kKeep) store(kept.teacher + at, et);
      }
      if constexpr (has_reverse(D)) {
        const Vf surplus = ys - yt;
        lanes[chain].reverse = fma(es, surplus, lanes[chain].reverse);
        if constexpr (kKeep) store(kept.surplus + at, Vf(es * surplus));
      }
    }
  }
  return folded(lanes, ms.value(), mt.value(), kBitsPerNat);
}

// The same where logits may be −∞ or far apart, relative to the block's own maxima. Exponents are in units of 2^16 nats
// here, in which neither a difference of two logits nor a block's sum of them overflows.
template <Divergence D>
KlSums sum_limits(const float* xs, const float* xt, int count, float student_reference, float teacher_reference) {
  constexpr float kNats = 65536.0f, kUnits = 1.0f / kNats;
  const float ms = student_reference * kUnits, mt = teacher_reference * kUnits;
  Lanes lanes[2];
  Vf forward_exposed = broadcast(-kInfinity), reverse_exposed = forward_exposed;
  // `first` is the distribution that the expectation is over: a word that either excludes adds nothing to it.
  const auto cross = [](Vf first, Vf second, Vf probability, Vf difference, Vf& sum, Vf& exposed) {
    const Vi open = Vi(second == -kInfinity);
    exposed = max(exposed, select(open, first, broadcast(-kInfinity)));
    sum += select(Vi(first == -kInfinity) | open, Vf{}, Vf(probability * difference));
  };
  for (int i = 0; i < count; i += kLanes) {
    const Vf s = load(xs + i), t = load(xt + i), ds = s * kUnits - ms, dt = t * kUnits - mt;
    const Vf es = exp(ds * kNats), et = exp(dt * kNats);
    lanes[0].student += es;
    lanes[0].teacher += et;
    lanes[0].energy = fma(et, max(broadcast(kLowest), dt), lanes[0].energy);
    if constexpr (has_forward(D)) cross(t, s, et, dt - ds, lanes[0].forward, forward_exposed);
    if constexpr (has_reverse(D)) cross(s, t, es, ds - dt, lanes[0].reverse, reverse_exposed);
  }
  KlSums sums = folded(lanes, student_reference, teacher_reference, kUnits);
  sums.forward.exposed = horizontal_max(forward_exposed);
  sums.reverse.exposed = horizontal_max(reverse_exposed);
  return sums;
}
inline bool is_finite(const KlSums& sums) {
  return std::isfinite(sums.student_sum + sums.teacher_sum + sums.teacher_energy + sums.forward.sum + sums.reverse.sum +
                       sums.label_sum);
}

// A reference for exponents: 0 stands in where every logit is −∞.
inline float finite_reference(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// Sums of nothing have no reference.
inline KlSums without_empty(KlSums sums) {
  if (sums.student_sum == 0) sums.student_reference = -INFINITY;
  if (sums.teacher_sum == 0) sums.teacher_reference = -INFINITY;
  return sums;
}

}  // namespace e3::E3_ISA_NAMESPACE
