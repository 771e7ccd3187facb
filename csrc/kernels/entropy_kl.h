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
// Terms are centred by the maxima: the raw Σp·z would cancel. A block of the row is summed relative to its own maxima in
// fp32 and joined to the row's sums in fp64, in the order of the blocks. The row pair is read from memory once: the
// gradient's sweep finds it in the cache and asks for the next rows meanwhile.
#pragma once

#include "kernels/block.h"
#include "kernels/token_loss.h"

namespace e3::E3_ISA_NAMESPACE {

// Sums of one or more blocks relative to their maxima; `cross` is B, or B with the roles exchanged.
struct KlSums {
  double student_max = -INFINITY;
  double teacher_max = -INFINITY;
  double student_sum = 0;
  double teacher_sum = 0;
  double teacher_energy = 0;  // A
  double cross = 0;
  double label_sum = 0;  // Σ e^{T·(x^s−m_s)}
};

struct JsdSums {
  double teacher = 0;  // Σ p·(log p − log μ)
  double student = 0;  // Σ q·(log q − log μ)
};

struct Shift {
  double by;      // m − m', <= 0
  double factor;  // e^by
};

inline Shift shift(double from, double to) {
  return from == to ? Shift{0.0, 1.0} : Shift{from - to, std::exp(from - to)};
}

// Moves the sums to the references (student_max, teacher_max). Empty sums (all logits −∞) stay 0; infinity stays infinity.
template <Divergence D>
void rebase(KlSums& sums, double student_max, double teacher_max, double temperature) {
  const Shift student = sums.student_sum == 0 ? Shift{0, 1} : shift(sums.student_max, student_max);
  const Shift teacher = sums.teacher_sum == 0 ? Shift{0, 1} : shift(sums.teacher_max, teacher_max);
  if (std::isfinite(sums.cross)) {
    sums.cross = D == Divergence::reverse
                     ? student.factor * (sums.cross + sums.student_sum * (student.by - teacher.by))
                     : teacher.factor * (sums.cross + sums.teacher_sum * (teacher.by - student.by));
  }
  sums.teacher_energy = teacher.factor * (sums.teacher_energy + sums.teacher_sum * teacher.by);
  sums.teacher_sum *= teacher.factor;
  sums.student_sum *= student.factor;
  if (sums.label_sum != 0) sums.label_sum *= std::exp(temperature * student.by);
  sums.student_max = student_max;
  sums.teacher_max = teacher_max;
}

template <Divergence D>
void join(KlSums& total, KlSums part, double temperature) {
  const double student_max = std::fmax(total.student_max, part.student_max);
  const double teacher_max = std::fmax(total.teacher_max, part.teacher_max);
  rebase<D>(total, student_max, teacher_max, temperature);
  rebase<D>(part, student_max, teacher_max, temperature);
  total.student_sum += part.student_sum;
  total.teacher_sum += part.teacher_sum;
  total.teacher_energy += part.teacher_energy;
  total.cross += part.cross;
  total.label_sum += part.label_sum;
}

// Σ over a block of e^{x−m} and of e^{x−m}·(x−m).
struct Energy {
  double sum;
  double energy;
};

template <bool kInfinite>
inline void add_energy(Vf x, float reference, Vf& delta, Vf& e, Vf& sum, Vf& energy) {
  delta = x - reference;
  e = exp(delta);
  sum += e;
  energy = fma(e, kInfinite ? max(broadcast(kPadding), delta) : delta, energy);
}

inline float finite_reference(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

template <bool kInfinite>
Energy energy_of(const float* x, int count, float reference) {
  Vf sum[2] = {}, energy[2] = {};
  for (int i = 0; i < count; i += kStep) {
    for (int chain = 0; chain < 2; ++chain) {
      Vf delta, e;
      add_energy<kInfinite>(load(x + i + chain * kLanes), reference, delta, e, sum[chain], energy[chain]);
    }
  }
  return {horizontal_sum(sum[0] + sum[1]), horizontal_sum(energy[0] + energy[1])};
}

// One term of `cross` where a logit of the block is −∞: 0 where the first distribution has no mass, +∞ where only the
// second has none.
inline Vf infinite_term(Vf first, Vf second, Vf plain) {
  const Vf reachable = select(Vi(second == -kInfinity), broadcast(kInfinity), plain);
  return select(Vi(first == -kInfinity), Vf{}, reachable);
}

template <Divergence D, bool kInfinite>
void sum_block(const float* xs, const float* xt, int count, KlSums& sums) {
  const float student_reference = finite_reference(sums.student_max);
  const float teacher_reference = finite_reference(sums.teacher_max);
  Vf student_sum[2] = {}, teacher_sum[2] = {}, energy[2] = {}, cross[2] = {};
  for (int i = 0; i < count; i += kStep) {
    for (int chain = 0; chain < 2; ++chain) {
      const Vf student = load(xs + i + chain * kLanes), teacher = load(xt + i + chain * kLanes);
      Vf dt, et;
      add_energy<kInfinite>(teacher, teacher_reference, dt, et, teacher_sum[chain], energy[chain]);
      const Vf ds = student - student_reference;
      const Vf es = exp(ds);
      student_sum[chain] += es;
      if constexpr (D == Divergence::forward) {
        const Vf difference = dt - ds;
        cross[chain] = kInfinite ? cross[chain] + infinite_term(teacher, student, et * difference)
                                 : fma(et, difference, cross[chain]);
      } else if constexpr (D == Divergence::reverse) {
        const Vf difference = ds - dt;
        cross[chain] = kInfinite ? cross[chain] + infinite_term(student, teacher, es * difference)
                                 : fma(es, difference, cross[chain]);
      }
    }
  }
  sums.student_sum = horizontal_sum(student_sum[0] + student_sum[1]);
  sums.teacher_sum = horizontal_sum(teacher_sum[0] + teacher_sum[1]);
  sums.teacher_energy = horizontal_sum(energy[0] + energy[1]);
  sums.cross = horizontal_sum(cross[0] + cross[1]);
}

// Σ e^{T·(x−m)}: the softmax without temperature that the cross-entropy needs.
inline float sum_untempered(const float* x, int count, float reference, float temperature) {
  Vf sum[2] = {};
  for (int i = 0; i < count; i += kStep) {
    for (int chain = 0; chain < 2; ++chain) {
      sum[chain] += exp((load(x + i + chain * kLanes) - reference) * temperature);
    }
  }
  return horizontal_sum(sum[0] + sum[1]);
}

// log p, log q and log μ of one vector; −∞ is held finite so that 0·log 0 = 0.
struct Mixture {
  Vf log_p, log_q, p, q, log_mu;
  Mixture(Vf xs, Vf xt, float student_log_norm, float teacher_log_norm, float beta)
      : log_p(max(broadcast(kPadding), xt - teacher_log_norm)),
        log_q(max(broadcast(kPadding), xs - student_log_norm)),
        p(exp(log_p)),
        q(exp(log_q)),
        log_mu(log(fma(broadcast(beta), p, (1.0f - beta) * q))) {}
};

inline JsdSums sum_mixture(const float* xs, const float* xt, int count, float ls, float lt, float beta) {
  Vf teacher{}, student{};
  for (int i = 0; i < count; i += kLanes) {
    const Mixture m(load(xs + i), load(xt + i), ls, lt, beta);
    teacher = fma(m.p, m.log_p - m.log_mu, teacher);
    student = fma(m.q, m.log_q - m.log_mu, student);
  }
  return {horizontal_sum(teacher), horizontal_sum(student)};
}

template <Divergence D>
class EntropyKlRows {
 public:
  struct Statistics {
    TokenStats values;
    double student_max, teacher_max;
    double student_sum, teacher_sum, label_sum;
    JsdSums mixture;
    float student_log_norm() const { return static_cast<float>(student_max + std::log(student_sum)); }
    float teacher_log_norm() const { return static_cast<float>(teacher_max + std::log(teacher_sum)); }
  };

  explicit EntropyKlRows(const EntropyKl& problem)
      : problem_(problem),
        temperature_(problem.student_transform.temperature),
        untempered_(problem.tokens.labels != nullptr && temperature_ != 1.0f) {}

  int64_t support() const { return problem_.vocabulary; }
  int64_t row_bytes() const { return problem_.vocabulary * size_of(problem_.student.dtype); }

  double teacher_entropy(int64_t row, const Parallel& pool) const {
    const KlSums sums = fold_blocks<KlSums>(
        pool, problem_.vocabulary,
        [&](int64_t begin, int count) {
          alignas(64) float xt[kBlock];
          const Range range = load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, xt);
          const float reference = finite_reference(range.high);
          const Energy e = range.low == -kInfinity ? energy_of<true>(xt, count, reference)
                                                   : energy_of<false>(xt, count, reference);
          KlSums part;
          part.teacher_max = range.high;
          part.teacher_sum = e.sum;
          part.teacher_energy = e.energy;
          return part;
        },
        [&](KlSums& total, const KlSums& part) { join<D>(total, part, temperature_); });
    return entropy(sums);
  }

  Statistics statistics(int64_t row, const Parallel& pool) const {
    const KlSums sums = fold_blocks<KlSums>(
        pool, problem_.vocabulary,
        [&](int64_t begin, int count) { return block_sums(row, begin, count); },
        [&](KlSums& total, const KlSums& part) { join<D>(total, part, temperature_); });
    Statistics s{};
    s.student_max = sums.student_max;
    s.teacher_max = sums.teacher_max;
    s.student_sum = sums.student_sum;
    s.teacher_sum = sums.teacher_sum;
    s.label_sum = untempered_ ? sums.label_sum : sums.student_sum;
    s.values.teacher_entropy = entropy(sums);
    s.values.divergence = divergence(row, sums, pool, s);
    s.values.cross_entropy = problem_.tokens.labels == nullptr ? 0.0 : cross_entropy(row, s);
    return s;
  }

  // `ahead` is the row that this thread reads next.
  void gradient(int64_t row, const Statistics& s, const Coefficients& c, int64_t ahead, bool stream_out,
                const Parallel& pool, void* target) const {
    for_each_block(pool, problem_.vocabulary, [&](int64_t begin, int count) {
      alignas(64) float xs[kBlock], g[kBlock];
      load_block(problem_.student, row, begin, count, problem_.student_transform, xs, ahead);
      load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, g, ahead);
      divergence_gradient(xs, count, s, c, g);
      if (problem_.tokens.labels != nullptr) label_gradient(xs, begin, count, row, s, c, g);
      transform_gradient(xs, count, problem_.student_transform, g);
      store_block(g, count, problem_.student.dtype, stream_out, target, begin);
    });
  }

 private:
  static double entropy(const KlSums& sums) {
    return std::log(sums.teacher_sum) - sums.teacher_energy / sums.teacher_sum;
  }

  KlSums block_sums(int64_t row, int64_t begin, int count) const {
    alignas(64) float xs[kBlock], xt[kBlock];
    const Range s = load_block(problem_.student, row, begin, count, problem_.student_transform, xs);
    const Range t = load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, xt);
    KlSums sums;
    sums.student_max = s.high;
    sums.teacher_max = t.high;
    if (s.low == -kInfinity || t.low == -kInfinity) {
      sum_block<D, true>(xs, xt, count, sums);
    } else {
      sum_block<D, false>(xs, xt, count, sums);
    }
    if (untempered_) sums.label_sum = sum_untempered(xs, count, finite_reference(s.high), temperature_);
    return sums;
  }

  double divergence(int64_t row, const KlSums& sums, const Parallel& pool, Statistics& s) const {
    const double log_ratio = std::log(sums.student_sum) - std::log(sums.teacher_sum);
    if constexpr (D == Divergence::forward) return sums.cross / sums.teacher_sum + log_ratio;
    if constexpr (D == Divergence::reverse) return sums.cross / sums.student_sum - log_ratio;
    const float beta = static_cast<float>(problem_.beta);
    const float ls = s.student_log_norm(), lt = s.teacher_log_norm();
    s.mixture = fold_blocks<JsdSums>(
        pool, problem_.vocabulary,
        [&](int64_t begin, int count) {
          alignas(64) float xs[kBlock], xt[kBlock];
          load_block(problem_.student, row, begin, count, problem_.student_transform, xs);
          load_block(problem_.teacher, row, begin, count, problem_.teacher_transform, xt);
          return sum_mixture(xs, xt, count, ls, lt, beta);
        },
        [](JsdSums& total, const JsdSums& part) {
          total.teacher += part.teacher;
          total.student += part.student;
        });
    return problem_.beta * s.mixture.teacher + (1.0 - problem_.beta) * s.mixture.student;
  }

  double cross_entropy(int64_t row, const Statistics& s) const {
    alignas(64) float label[kStep];
    load_block(problem_.student, row, problem_.tokens.labels[row], 1, problem_.student_transform, label);
    return std::log(s.label_sum) + (s.student_max - label[0]) * temperature_;
  }

  // g holds x^t and becomes a·∂D/∂f; with T = 1 the cross-entropy's softmax is q and joins in.
  void divergence_gradient(const float* xs, int count, const Statistics& s, const Coefficients& c, float* g) const {
    const double a = c.divergence / temperature_;
    if constexpr (D == Divergence::forward) {
      const double b = problem_.tokens.labels != nullptr && !untempered_ ? c.cross_entropy : 0.0;
      forward_gradient(xs, count, s, static_cast<float>((a + b) / s.student_sum), static_cast<float>(a / s.teacher_sum), g);
    } else {
      const float beta = static_cast<float>(problem_.beta);
      const float ls = s.student_log_norm(), lt = s.teacher_log_norm();
      const float mean = static_cast<float>(D == Divergence::reverse ? s.values.divergence : s.mixture.student);
      const float scale = static_cast<float>(D == Divergence::reverse ? a : a * (1.0 - problem_.beta));
      for (int i = 0; i < count; i += kLanes) {
        const Mixture m(load(xs + i), load(g + i), ls, lt, beta);
        const Vf other = D == Divergence::reverse ? m.log_p : m.log_mu;
        store(g + i, scale * m.q * (m.log_q - other - mean));
      }
    }
  }

  static void forward_gradient(const float* xs, int count, const Statistics& s, float student, float teacher, float* g) {
    const float ms = static_cast<float>(s.student_max), mt = static_cast<float>(s.teacher_max);
    for (int i = 0; i < count; i += kLanes) {
      const Vf es = exp(load(xs + i) - ms), et = exp(load(g + i) - mt);
      store(g + i, fma(es, broadcast(student), et * -teacher));
    }
  }

  void label_gradient(const float* xs, int64_t begin, int count, int64_t row, const Statistics& s, const Coefficients& c,
                      float* g) const {
    if (c.cross_entropy == 0.0) return;
    if (untempered_ || D != Divergence::forward) {
      const float scale = static_cast<float>(c.cross_entropy / s.label_sum);
      const float ms = static_cast<float>(s.student_max);
      for (int i = 0; i < count; i += kLanes) {
        store(g + i, fma(exp((load(xs + i) - ms) * temperature_), broadcast(scale), load(g + i)));
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
