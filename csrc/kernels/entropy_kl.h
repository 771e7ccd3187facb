// Divergence of a student from a dense teacher, the teacher's entropy and the cross-entropy of a label, with gradient.
//
// For one token, x^s and x^t the transformed logits over the temperature, q and p their softmax:
//
//   Z = Σ e^{x−m}                     log q = x − m − log Z
//   H = log Z_t − A/Z_t               A = Σ e^{x^t−m_t}·(x^t−m_t)
//   forward  KL(p‖q) = B/Z_t − log Z_t + log Z_s        B = Σ e^{x^t−m_t}·((x^t−m_t) − (x^s−m_s))
//   reverse  KL(q‖p) = the same with the roles of s and t exchanged
//   jsd      β·KL(p‖μ) + (1−β)·KL(q‖μ),  μ = βp + (1−β)q            (a second sweep: μ needs both Z)
//
//   ∂forward/∂x^s = q − p
//   ∂reverse/∂x^s = q·(log q − log p − KL(q‖p))
//   ∂jsd/∂x^s     = (1−β)·q·(log q − log μ − KL(q‖μ))
//   ∂CE/∂f(z^s)   = softmax(f(z^s)) − onehot(label)
//
// Terms are centred: the raw Σp·z would cancel. The reference m of a row is the maximum of its first values, so that
// the sums of all blocks add up as they are; a block for which that reference is too low (overflow), or that holds −∞,
// is summed anew relative to its own maximum, and so are all blocks where the reference is too large to be exact.
// Blocks are summed in fp32 and joined in fp64, in their order. A normaliser travels as (m, log Z): beside an m of 1e38
// their sum has no room for log Z.
//
// The plain sums have their exponents in bits, y = (x − m)·log2 e, so that A and B come out as multiples of log2 e.
//
// The row pair is read from memory once. The gradient's sweep finds it in the cache, or, for the forward divergence,
// finds e^{x−m} of both there.
#pragma once

#include "kernels/token_loss.h"
#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

// Sums of one or more blocks relative to references m; `cross` is B, or B with the roles exchanged.
struct KlSums {
  double student_reference = -INFINITY;
  double teacher_reference = -INFINITY;
  double student_sum = 0;
  double teacher_sum = 0;
  double teacher_energy = 0;  // A
  double cross = 0;
  double label_sum = 0;  // Σ e^{T·(x^s−m_s)}
  double exposed = -INFINITY;  // the largest logit of the first distribution where the second has −∞
  bool plain = true;  // no block needed a reference of its own
};

struct JsdSums {
  double teacher = 0;  // Σ p·(log p − log μ)
  double student = 0;  // Σ q·(log q − log μ)
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
  sums.cross = D == Divergence::reverse ? student.factor * (sums.cross + sums.student_sum * (student.by - teacher.by))
                                        : teacher.factor * (sums.cross + sums.teacher_sum * (teacher.by - student.by));
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
  total.cross += part.cross;
  total.label_sum += part.label_sum;
  total.exposed = std::fmax(total.exposed, part.exposed);
  total.plain &= part.plain;
}

// Running sums of one chain of lanes.
struct Lanes {
  Vf student{}, teacher{}, energy{}, cross{};
};

// Lanes whose exponents are in units of which `unit` make a nat.
inline KlSums folded(const Lanes (&lanes)[2], double student_reference, double teacher_reference, double unit) {
  KlSums sums;
  sums.student_reference = student_reference;
  sums.teacher_reference = teacher_reference;
  sums.student_sum = horizontal_sum(lanes[0].student + lanes[1].student);
  sums.teacher_sum = horizontal_sum(lanes[0].teacher + lanes[1].teacher);
  sums.teacher_energy = horizontal_sum(lanes[0].energy + lanes[1].energy) / unit;
  sums.cross = horizontal_sum(lanes[0].cross + lanes[1].cross) / unit;
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

// Where the exponentials of a block are kept for the gradient.
struct Kept {
  float* student;
  float* teacher;
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
      if constexpr (kKeep) {
        store(kept.student + at, es);
        store(kept.teacher + at, et);
      }
      if constexpr (D == Divergence::forward) lanes[chain].cross = fma(et, yt - ys, lanes[chain].cross);
      if constexpr (D == Divergence::reverse) lanes[chain].cross = fma(es, ys - yt, lanes[chain].cross);
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
  Vf exposed = broadcast(-kInfinity);
  // `first` is the distribution that the expectation is over: a word that either excludes adds nothing to it.
  const auto cross = [&](Vf first, Vf second, Vf probability, Vf difference) {
    const Vi open = Vi(second == -kInfinity);
    exposed = max(exposed, select(open, first, broadcast(-kInfinity)));
    lanes[0].cross += select(Vi(first == -kInfinity) | open, Vf{}, Vf(probability * difference));
  };
  for (int i = 0; i < count; i += kLanes) {
    const Vf s = load(xs + i), t = load(xt + i), ds = s * kUnits - ms, dt = t * kUnits - mt;
    const Vf es = exp(ds * kNats), et = exp(dt * kNats);
    lanes[0].student += es;
    lanes[0].teacher += et;
    lanes[0].energy = fma(et, max(broadcast(kLowest), dt), lanes[0].energy);
    if constexpr (D == Divergence::forward) cross(t, s, et, dt - ds);
    if constexpr (D == Divergence::reverse) cross(s, t, es, ds - dt);
  }
  KlSums sums = folded(lanes, student_reference, teacher_reference, kUnits);
  sums.exposed = horizontal_max(exposed);
  return sums;
}

// The logarithm of Σ e^x: m + log_sum.
struct LogNorm {
  float m;
  float log_sum;
};

inline LogNorm log_norm(double reference, double sum) {
  const float m = static_cast<float>(reference);
  return {m, static_cast<float>(reference - m + std::log(sum))};
}

// Where the two models stand in the mixture: the normalisers of both, and β and 1 − β, each rounded once.
struct Mixing {
  LogNorm student, teacher;
  float beta, rest;
};

// log p, log q and log μ of one vector; −∞ is held finite so that 0·log 0 = 0.
struct Mixture {
  Vf log_p, log_q, p, q, log_mu;
  Mixture(Vf xs, Vf xt, const Mixing& by)
      : log_p(max(broadcast(kLowest), (xt - by.teacher.m) - by.teacher.log_sum)),
        log_q(max(broadcast(kLowest), (xs - by.student.m) - by.student.log_sum)),
        p(exp(log_p)),
        q(exp(log_q)),
        log_mu(log(fma(broadcast(by.beta), p, by.rest * q))) {}
};

inline JsdSums sum_mixture(const float* xs, const float* xt, int count, const Mixing& by) {
  Vf teacher{}, student{};
  for (int i = 0; i < count; i += kLanes) {
    const Mixture m(load(xs + i), load(xt + i), by);
    teacher = fma(m.p, m.log_p - m.log_mu, teacher);
    student = fma(m.q, m.log_q - m.log_mu, student);
  }
  return {horizontal_sum(teacher), horizontal_sum(student)};
}

inline bool is_finite(const KlSums& sums) {
  return std::isfinite(sums.student_sum + sums.teacher_sum + sums.teacher_energy + sums.cross + sums.label_sum);
}

// A reference for exponents: 0 stands in where every logit is −∞.
inline float finite_reference(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// Sums of nothing have no reference.
inline KlSums without_empty(KlSums sums) {
  if (sums.student_sum == 0) sums.student_reference = -INFINITY;
  if (sums.teacher_sum == 0) sums.teacher_reference = -INFINITY;
  return sums;
}

template <Divergence D>
class EntropyKlRows {
 public:
  struct Statistics {
    TokenStats values;
    KlSums sums;
    JsdSums mixture;
    bool kept;  // the exponentials of the row are in the scratch
  };

  explicit EntropyKlRows(const EntropyKl& problem)
      : problem_(problem),
        temperature_(problem.student_transform.temperature),
        untempered_(problem.tokens.labels != nullptr && temperature_ != 1.0f) {}

  int64_t columns() const { return problem_.vocabulary; }
  int64_t row_bytes() const { return problem_.vocabulary * size_of(problem_.student.dtype); }

  // Both rows' exponentials, where they fit the cache and the gradient is a sum of them.
  int64_t scratch_floats(bool need_grad) const {
    const bool linear = D == Divergence::forward && !untempered_ && problem_.student_transform.softcap <= 0;
    return need_grad && linear && problem_.vocabulary <= kKeptColumns ? 2 * padded_row() + kLanes : 0;
  }

  TeacherEntropy teacher_entropy(int64_t row, const RowContext& context) const {
    const float first = first_max(problem_.teacher, row, problem_.vocabulary, problem_.teacher_transform);
    return entropy(fold(context.pool, [&](int64_t begin, int count) {
      alignas(64) float scratch[kRoom];
      const Transform& transform = problem_.teacher_transform;
      if (serves_plain(first)) {
        const Prefetch ahead = prefetch_ahead(problem_.teacher, row, row + 1, begin, problem_.vocabulary);
        const KlSums sums = with_values(block_values(problem_.teacher, row, begin, count, transform, scratch),
                                        [&](const auto* xt) { return sum_teacher(xt, padded(count), first, ahead); });
        if (is_finite(sums)) return sums;
      }
      const float* xt = load_block(problem_.teacher, row, begin, count, transform, scratch);
      const float own = finite_reference(block_max(xt, padded(count)));
      return without_empty(sum_limits<Divergence::jsd>(xt, xt, padded(count), own, own));
    }));
  }

  template <class Before>
  Statistics statistics(int64_t row, const RowContext& context, Before& before) const {
    const References first{first_max(problem_.student, row, problem_.vocabulary, problem_.student_transform),
                           first_max(problem_.teacher, row, problem_.vocabulary, problem_.teacher_transform)};
    Statistics s{};
    s.sums = fold(context.pool, [&](int64_t begin, int count) {
      before(begin, count);
      return block_sums(row, begin, count, first, context);
    });
    if (!untempered_) s.sums.label_sum = s.sums.student_sum;
    s.kept = context.scratch != nullptr && s.sums.plain;
    s.values.teacher_entropy = entropy(s.sums);
    s.values.divergence = divergence(row, context.pool, s);
    s.values.cross_entropy = problem_.tokens.labels == nullptr ? 0.0 : cross_entropy(row, s);
    return s;
  }

  auto gradient(int64_t row, const Statistics& s, const Coefficients& c, const RowContext& context, bool stream_out,
                void* target) const {
    return [=, this](int64_t begin, int count) {
      if (s.kept) return kept_gradient(row, begin, count, s, c, context, stream_out, target);
      alignas(64) float student[kRoom], teacher[kRoom], g[kRoom];
      const Transform& transform = problem_.student_transform;
      const float* xs = load_block(problem_.student, row, begin, count, transform, student);
      const float* xt = load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, teacher);
      if (c.divergent) {
        divergence_gradient(xs, xt, padded(count), s, c, g);
      } else {
        std::memset(g, 0, sizeof g);
      }
      label_gradient(xs, row, begin, count, s, c, g);
      transform_gradient(xs, count, transform, g);
      store_block(g, count, problem_.student.dtype, stream_out, target, begin);
    };
  }

 private:
  static constexpr int64_t kKeptColumns = 1 << 18;

  int64_t padded_row() const { return (problem_.vocabulary + kStep - 1) / kStep * kStep; }

  TeacherEntropy entropy(const KlSums& sums) const {
    return {std::log(sums.teacher_sum) - sums.teacher_energy / sums.teacher_sum, problem_.vocabulary};
  }

  template <class Part>
  KlSums fold(const Parallel& pool, const Part& part) const {
    return fold_blocks<KlSums>(pool, problem_.vocabulary, part,
                               [&](KlSums& total, const KlSums& sums) { join<D>(total, sums, temperature_); });
  }

  KlSums block_sums(int64_t row, int64_t begin, int count, References first, const RowContext& context) const {
    alignas(64) float student[kRoom], teacher[kRoom];
    if (serves_plain(first.student) && serves_plain(first.teacher)) {
      const KlSums sums = plain_sums(row, begin, count, first, context, student, teacher);
      if (is_finite(sums)) return sums;
    }
    const float* xs = load_block(problem_.student, row, begin, count, problem_.student_transform, student);
    const float* xt = load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, teacher);
    const float ms = finite_reference(block_max(xs, padded(count))),
                mt = finite_reference(block_max(xt, padded(count)));
    KlSums sums = sum_limits<D>(xs, xt, padded(count), ms, mt);
    if (untempered_) sums.label_sum = sum_untempered(xs, padded(count), ms, temperature_);
    sums = without_empty(sums);
    sums.plain = false;
    return sums;
  }

  KlSums plain_sums(int64_t row, int64_t begin, int count, References m, const RowContext& context, float* student,
                    float* teacher) const {
    float* kept = context.scratch;
    const auto prefetch = [&](const Rows& rows) {
      return prefetch_ahead(rows, row, context.next, begin, problem_.vocabulary);
    };
    const Ahead ahead{prefetch(problem_.student), prefetch(problem_.teacher)};
    const Transform &of_student = problem_.student_transform, &of_teacher = problem_.teacher_transform;
    BlockValues xs = block_values(problem_.student, row, begin, count, of_student, student);
    BlockValues xt = block_values(problem_.teacher, row, begin, count, of_teacher, teacher);
    if (xs.dtype != xt.dtype) {
      xs = {DType::float32, load_block(problem_.student, row, begin, count, of_student, student)};
      xt = {DType::float32, load_block(problem_.teacher, row, begin, count, of_teacher, teacher)};
    }
    KlSums sums = with_values(xs, [&](const auto* values) {
      const auto* teachers = static_cast<decltype(values)>(xt.data);
      if constexpr (D == Divergence::forward) {
        if (kept != nullptr) {
          const Kept here{kept + begin, kept + padded_row() + begin};
          return sum_block<D, true>(values, teachers, padded(count), m, ahead, here);
        }
      }
      return sum_block<D, false>(values, teachers, padded(count), m, ahead, {});
    });
    if (untempered_) {
      const float* loaded = load_block(problem_.student, row, begin, count, problem_.student_transform, student);
      sums.label_sum = sum_untempered(loaded, padded(count), sums.student_reference, temperature_);
    }
    return sums;
  }

  // +∞ where the first distribution has mass and the second none. Of a logit it has none where e^{x−m} is 0 even in
  // fp64.
  double divergence(int64_t row, const Parallel& pool, Statistics& s) const {
    constexpr double kNoMass = -745.0;
    const double log_student = std::log(s.sums.student_sum), log_teacher = std::log(s.sums.teacher_sum);
    if constexpr (D == Divergence::forward) {
      if (s.sums.exposed - s.sums.teacher_reference - log_teacher > kNoMass) return INFINITY;
      return s.sums.cross / s.sums.teacher_sum + log_student - log_teacher;
    }
    if constexpr (D == Divergence::reverse) {
      if (s.sums.exposed - s.sums.student_reference - log_student > kNoMass) return INFINITY;
      return s.sums.cross / s.sums.student_sum + log_teacher - log_student;
    }
    const Mixing by = mixing(s);
    s.mixture = fold_blocks<JsdSums>(
        pool, problem_.vocabulary,
        [&](int64_t begin, int count) {
          alignas(64) float student[kRoom], teacher[kRoom];
          const float* xs = load_block(problem_.student, row, begin, count, problem_.student_transform, student);
          const float* xt = load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, teacher);
          return sum_mixture(xs, xt, padded(count), by);
        },
        [](JsdSums& total, const JsdSums& part) {
          total.teacher += part.teacher;
          total.student += part.student;
        });
    return problem_.beta * s.mixture.teacher + (1.0 - problem_.beta) * s.mixture.student;
  }

  Mixing mixing(const Statistics& s) const {
    return {log_norm(s.sums.student_reference, s.sums.student_sum),
            log_norm(s.sums.teacher_reference, s.sums.teacher_sum), static_cast<float>(problem_.beta),
            static_cast<float>(1.0 - problem_.beta)};
  }

  double cross_entropy(int64_t row, const Statistics& s) const {
    alignas(64) float scratch[kStep];
    const float* label =
        load_block(problem_.student, row, problem_.tokens.labels[row], 1, problem_.student_transform, scratch);
    return std::log(s.sums.label_sum) + (s.sums.student_reference - *label) * temperature_;
  }

  // a·q − b·p with T = 1 or without labels: the cross-entropy's softmax is q and joins in a.
  struct Slopes {
    float student;
    float teacher;
  };

  Slopes slopes(const Statistics& s, const Coefficients& c) const {
    const double a = c.divergence / temperature_;
    const double b = problem_.tokens.labels != nullptr && !untempered_ ? c.cross_entropy : 0.0;
    return {static_cast<float>((a + b) / s.sums.student_sum), static_cast<float>(a / s.sums.teacher_sum)};
  }

  // From the kept exponentials straight to the result; the label's element is written again, less the one-hot.
  void kept_gradient(int64_t row, int64_t begin, int count, const Statistics& s, const Coefficients& c,
                     const RowContext& context, bool stream_out, void* target) const {
    const Slopes slope = slopes(s, c);
    const float scale = problem_.student_transform.scale;
    const float student = slope.student * scale, teacher = -slope.teacher * scale;
    const float *es = context.scratch + begin, *et = es + padded_row();
    const auto value = [&](int i) { return fma(load(es + i), broadcast(student), load(et + i) * teacher); };
    store_values(count, problem_.student.dtype, stream_out, target, begin, value);
    const int64_t label = problem_.tokens.labels == nullptr ? -1 : problem_.tokens.labels[row] - begin;
    if (label < 0 || label >= count) return;
    const float hard = static_cast<float>(c.cross_entropy) * scale;
    const auto at_label = [&](int) { return value(static_cast<int>(label)) - hard; };
    store_values(1, problem_.student.dtype, false, target, begin + label, at_label);
  }

  void divergence_gradient(const float* xs, const float* xt, int count, const Statistics& s, const Coefficients& c,
                           float* g) const {
    if constexpr (D == Divergence::forward) {
      const Slopes slope = slopes(s, c);
      const Rounded ms(s.sums.student_reference), mt(s.sums.teacher_reference);
      const float student = slope.student * ms.factor(), teacher = -slope.teacher * mt.factor();
      for (int i = 0; i < count; i += kLanes) {
        const Vf es = exp(load(xs + i) - ms.value), et = exp(load(xt + i) - mt.value);
        store(g + i, fma(es, broadcast(student), et * teacher));
      }
    } else {
      const Mixing by = mixing(s);
      const double a = c.divergence / temperature_ * (D == Divergence::reverse ? 1.0 : 1.0 - problem_.beta);
      const float slope = static_cast<float>(a);
      const float mean = static_cast<float>(D == Divergence::reverse ? s.values.divergence : s.mixture.student);
      for (int i = 0; i < count; i += kLanes) {
        const Mixture m(load(xs + i), load(xt + i), by);
        const Vf other = D == Divergence::reverse ? m.log_p : m.log_mu;
        store(g + i, select(Vi(m.q == 0.0f), Vf{}, Vf(slope * m.q * (m.log_q - other - mean))));
      }
    }
  }

  // Adds the cross-entropy's softmax, where it is not q already, and its −1 at the label.
  void label_gradient(const float* xs, int64_t row, int64_t begin, int count, const Statistics& s,
                      const Coefficients& c, float* g) const {
    if (problem_.tokens.labels == nullptr || c.cross_entropy == 0.0) return;
    if (untempered_ || D != Divergence::forward || !c.divergent) {
      const Rounded ms(s.sums.student_reference);
      const float slope = static_cast<float>(c.cross_entropy / s.sums.label_sum) * ms.factor(temperature_);
      for (int i = 0; i < count; i += kLanes) {
        store(g + i, fma(exp((load(xs + i) - ms.value) * temperature_), broadcast(slope), load(g + i)));
      }
    }
    const int64_t column = problem_.tokens.labels[row] - begin;
    if (column >= 0 && column < count) g[column] -= static_cast<float>(c.cross_entropy);
  }

  const EntropyKl& problem_;
  float temperature_;
  bool untempered_;
};

template <class Body>
inline void with_divergence(const EntropyKl& problem, const Body& body) {
  switch (problem.divergence) {
    case Divergence::forward: return body(EntropyKlRows<Divergence::forward>(problem));
    case Divergence::reverse: return body(EntropyKlRows<Divergence::reverse>(problem));
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
