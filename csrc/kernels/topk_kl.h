// Divergence of a student from k stored log-probabilities of a teacher a token, with gradient.
//
// x = f(z)/T of the student, m a reference of its row, E = e^{x−m}. "Stored" are the ids whose log-probability is not
// −∞, each at its first place in the row; S is their number:
//
//   bucket     S + 1 events: the stored ids and all others;  p_rest = 1 − Σp,  q_rest = Σ_{not stored} E / Σ E
//   renorm     S events, both sides renormalised over the stored ids
//   truncated  Σ p(log p − log q) over the stored ids; not a divergence
//
// With g_j = ∂D/∂log q_j of event j and G = Σ g_j:
//
//   ∂D/∂x_i = g_i − G·q_i            i stored
//           = g_rest·E_i/Σ_{not stored}E − G·E_i/ΣE     else (renorm: 0; truncated: g_rest = 0)
//
// Only the ids that are not stored are summed over blocks, relative to a reference of their own, since 1 − Σq cancels
// when little is left and a peak among the stored ids would leave nothing of it; the stored ids join in fp64. The row
// is read once and stays in the cache for the gradient.
#pragma once

#include "kernels/token_loss.h"
#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

struct EventTerm {
  double value;
  double slope;  // ∂value/∂log q, up to a multiple of q that the softmax's gradient cancels
};

// 0·(±∞) counts as 0.
inline double expectation(double p, double value) { return p == 0.0 ? 0.0 : p * value; }

inline double log_add(double a, double b) {
  const double high = a > b ? a : b;
  return std::isinf(high) ? high : high + std::log1p(std::exp(-std::fabs(a - b)));
}

inline EventTerm event_term(Divergence divergence, double beta, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q);
  if (divergence == Divergence::forward) return {expectation(p, log_p - log_q), -p};
  if (divergence == Divergence::reverse) {
    const double term = expectation(q, log_q - log_p);
    return {term, term};
  }
  const double log_m = log_add(log_p + std::log(beta), log_q + std::log1p(-beta));
  const double term = (1.0 - beta) * expectation(q, log_q - log_m);
  return {beta * expectation(p, log_p - log_m) + term, term};
}

// Sums of E over the ids that are not stored, relative to a reference.
struct TopkSums {
  double reference = -INFINITY;
  double rest = 0;
  double label_sum = 0;  // Σ e^{T·(x−m)}
  bool plain = true;
};

inline void join(TopkSums& total, TopkSums part, double temperature) {
  if (total.reference != part.reference) {
    const double reference = std::fmax(total.reference, part.reference);
    for (TopkSums* sums : {&total, &part}) {
      const double by = sums->rest == 0 ? 0.0 : sums->reference - reference;
      sums->rest *= std::exp(by);
      sums->label_sum *= std::exp(temperature * by);
      sums->reference = reference;
    }
  }
  total.rest += part.rest;
  total.label_sum += part.label_sum;
  total.plain &= part.plain;
}

// log Σ e^{T·x} over all ids as T·m + log_sum, apart: beside an m of 1e38 their sum has no room for log_sum.
struct Normaliser {
  double m;
  double log_sum;
  double temperature;
  double log_share(double x) const { return temperature * (x - m) - log_sum; }
};

// Σ E; the terms are kept in `kept`.
template <class T, class Exponential>
float sum_exponentials(const T* x, int count, const Exponential& exponential, float* kept, Prefetch ahead) {
  Vf sum[2] = {};
  for (int i = 0; i < count; i += kStep) {
    ahead.step();
    for (int chain = 0; chain < 2; ++chain) {
      const int at = i + chain * kLanes;
      const Vf e = exponential(load(x + at));
      store(kept + at, e);
      sum[chain] += e;
    }
  }
  return horizontal_sum(sum[0] + sum[1]);
}

// g = or += slope·e^{T·(x−m)}.
inline void exponential_gradient(const float* x, int count, const Rounded& reference, float temperature, float slope,
                                 bool add, float* g) {
  slope *= reference.factor(temperature);
  for (int i = 0; i < count; i += kLanes) {
    const Vf term = exp((load(x + i) - reference.value) * temperature) * slope;
    store(g + i, add ? load(g + i) + term : term);
  }
}

class TopkKlRows {
 public:
  struct Statistics {
    TokenStats values;
    TopkSums sums;
    Normaliser norm;  // of q
    Normaliser label_norm;  // of the softmax at T = 1
    double slope_sum;  // G
    double rest_slope;  // g_rest
  };

  explicit TopkKlRows(const TopkKl& problem)
      : problem_(problem),
        temperature_(problem.transform.temperature),
        full_(problem.tail != Tail::renorm || problem.tokens.labels != nullptr),
        keeps_(full_ && problem.transform.softcap <= 0 && problem.vocabulary <= kKeptColumns &&
               (temperature_ == 1.0f || problem.tokens.labels == nullptr)) {}

  int64_t columns() const { return problem_.vocabulary; }
  int64_t row_bytes() const { return problem_.vocabulary * size_of(problem_.student.dtype); }

  // Three doubles a stored id, then, for a gradient that is a multiple of them, the row's exponentials and room past
  // its end.
  int64_t scratch_floats(bool need_grad) const {
    const int64_t row = (problem_.vocabulary + kStep - 1) / kStep * kStep;
    return id_floats() + (need_grad && keeps_ ? row + kLanes : 0);
  }

  // The entropy of the stored probabilities, renormalised; `log_teacher` gets the row, −∞ where nothing is stored.
  TeacherEntropy teacher_entropy(int64_t row, const RowContext& context) const {
    double* log_p = log_teacher(context);
    TeacherEntropy entropy{0.0, 0};
    for (int64_t j = 0; j < problem_.k; ++j) {
      const bool counts = is_stored(row, j) && !is_repeated(row, j);
      log_p[j] = counts ? problem_.teacher_logprobs[row * problem_.k + j] : -INFINITY;
      entropy.support += counts;
    }
    const double norm = log_sum(log_p);
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (log_p[j] != -INFINITY) entropy.value -= expectation(std::exp(log_p[j] - norm), log_p[j] - norm);
    }
    return entropy;
  }

  template <class Before>
  Statistics statistics(int64_t row, const RowContext& context, Before& before) const {
    Statistics s{};
    if (full_) {
      const float first = first_max(problem_.student, row, problem_.vocabulary, problem_.transform);
      const auto joined = [&](const auto& part) {
        return fold_blocks<TopkSums>(context.pool, problem_.vocabulary, part,
                                     [&](TopkSums& total, const TopkSums& sums) { join(total, sums, temperature_); });
      };
      s.sums = joined([&](int64_t begin, int count) {
        before(begin, count);
        return block_sums(row, begin, count, first, context);
      });
      if (s.sums.plain && s.sums.rest < kTooLittle) {  // the reference was a stored id's, far above all others
        s.sums = joined([&](int64_t begin, int count) { return own_sums(row, begin, count, context); });
      }
      if (temperature_ == 1.0f) s.sums.label_sum = s.sums.rest;
    } else {
      before.finish();
    }
    s.values.teacher_entropy = teacher_entropy(row, context);
    events(row, context, s);
    if (problem_.tokens.labels != nullptr) {
      s.label_norm = normaliser(context, s.sums.reference, s.sums.label_sum, temperature_);
      s.values.cross_entropy = -s.label_norm.log_share(value_at(row, problem_.tokens.labels[row]));
      for (int64_t j = 0; j < problem_.k; ++j) {
        double& x = log_student(context)[j];
        x = std::exp(s.label_norm.log_share(x));
      }
    }
    return s;
  }

  auto gradient(int64_t row, const Statistics& s, const Coefficients& c, const RowContext& context, bool stream_out,
                void* target) const {
    const double a = c.divergence / temperature_;
    const bool labelled = problem_.tokens.labels != nullptr && c.cross_entropy != 0.0;
    const bool divergent = problem_.tail != Tail::renorm && c.divergent;
    const bool any = s.sums.rest != 0;
    // What E is multiplied by: the softmax of the cross-entropy at T = 1 is q.
    const double q = any ? std::exp(s.norm.log_share(s.sums.reference)) : 0.0;
    const double hard = labelled && any ? c.cross_entropy * std::exp(s.label_norm.log_share(s.sums.reference)) : 0.0;
    const bool together = labelled && temperature_ == 1.0f;
    const double rest = divergent && any ? a * (s.rest_slope / s.sums.rest - s.slope_sum * q) : 0.0;
    const double common = rest + (together ? hard : 0.0);
    const Rounded reference(any ? s.sums.reference : 0.0);
    const DType dtype = problem_.student.dtype;
    // Stored ids and the label, which differ, are put in as multiples of what the kept exponentials are multiplied by.
    const double unit = 1.0 / common;
    const bool kept = keeps_ && s.sums.plain && std::fabs(unit) < 1e30;
    return [=, this](int64_t begin, int count) {
      const int64_t label = labelled ? problem_.tokens.labels[row] - begin : -1;
      const bool labelled_here = label >= 0 && label < count;
      if (kept) {
        float* e = exponentials(context) + begin;
        stored_gradient(row, begin, count, c.divergent, a * unit, labelled, c.cross_entropy * unit, context, e);
        if (labelled_here) e[label] -= static_cast<float>(c.cross_entropy * unit);
        const float factor = static_cast<float>(common * problem_.transform.scale);
        return store_values(count, dtype, stream_out, target, begin, [&](int i) { return load(e + i) * factor; });
      }
      alignas(64) float scratch[kRoom], g[kRoom];
      const float* x = load_block(problem_.student, row, begin, count, problem_.transform, scratch);
      if (full_) {
        exponential_gradient(x, padded(count), reference, 1.0f, static_cast<float>(common), false, g);
      } else {
        std::memset(g, 0, sizeof(float) * count);
      }
      if (labelled && !together) {
        exponential_gradient(x, padded(count), reference, temperature_, static_cast<float>(hard), true, g);
      }
      stored_gradient(row, begin, count, c.divergent, a, labelled, c.cross_entropy, context, g);
      if (labelled_here) g[label] -= static_cast<float>(c.cross_entropy);
      transform_gradient(x, count, problem_.transform, g);
      store_block(g, count, dtype, stream_out, target, begin);
    };
  }

 private:
  static constexpr int64_t kKeptColumns = 1 << 18;
  static constexpr double kTooLittle = 1e-20;  // of a sum of fp32 exponentials: below it terms that matter may be lost

  int64_t id_floats() const { return (6 * problem_.k + 15) / 16 * 16; }
  double* slopes(const RowContext& context) const { return reinterpret_cast<double*>(context.scratch); }
  double* log_student(const RowContext& context) const { return slopes(context) + problem_.k; }
  double* log_teacher(const RowContext& context) const { return log_student(context) + problem_.k; }
  float* exponentials(const RowContext& context) const { return context.scratch + id_floats(); }

  bool is_stored(int64_t row, int64_t j) const { return problem_.teacher_logprobs[row * problem_.k + j] != -INFINITY; }
  int64_t id(int64_t row, int64_t j) const { return problem_.teacher_ids[row * problem_.k + j]; }

  // Whether an earlier place of the row stores the same id; all of them are looked at, several at a time.
  bool is_repeated(int64_t row, int64_t j) const {
    bool found = false;
    for (int64_t i = 0; i < j; ++i) found |= (id(row, i) == id(row, j)) & is_stored(row, i);
    return found;
  }

  bool holds_stored(int64_t row, int64_t begin, int count) const {
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (id(row, j) >= begin && id(row, j) < begin + count && is_stored(row, j)) return true;
    }
    return false;
  }

  // log Σ e^value of the k values, −∞ for none.
  double log_sum(const double* values) const {
    double high = -INFINITY, sum = 0;
    for (int64_t j = 0; j < problem_.k; ++j) high = values[j] > high ? values[j] : high;
    for (int64_t j = 0; j < problem_.k; ++j) sum += values[j] == -INFINITY ? 0.0 : std::exp(values[j] - high);
    return sum == 0 ? -INFINITY : high + std::log(sum);
  }

  float value_at(int64_t row, int64_t column) const {
    alignas(64) float scratch[kStep];
    return *load_block(problem_.student, row, column, 1, problem_.transform, scratch);
  }

  // The columns of a block, −∞ at the stored ids, in `scratch`.
  const float* unstored(int64_t row, int64_t begin, int count, float* scratch) const {
    const float* x = load_block(problem_.student, row, begin, count, problem_.transform, scratch);
    if (x != scratch) std::memcpy(scratch, x, sizeof(float) * count);
    for (int64_t j = 0; j < problem_.k; ++j) {
      const int64_t column = id(row, j) - begin;
      if (column >= 0 && column < count && is_stored(row, j)) scratch[column] = -kInfinity;
    }
    return scratch;
  }

  TopkSums block_sums(int64_t row, int64_t begin, int count, float first, const RowContext& context) const {
    if (serves_plain(first)) {
      alignas(64) float scratch[kRoom];
      const Rows& student = problem_.student;
      const BlockValues values = holds_stored(row, begin, count)
                                     ? BlockValues{DType::float32, unstored(row, begin, count, scratch)}
                                     : block_values(student, row, begin, count, problem_.transform, scratch);
      const TopkSums sums = with_values(values, [&](const auto* x) {
        using T = std::decay_t<decltype(*x)>;
        const Reference<T> m(first);
        return sums_of(
            row, begin, count, x, m.value(), [=](Vf value) { return exp2<T>(m.bits_above(value)); }, context);
      });
      if (std::isfinite(sums.rest + sums.label_sum)) return sums;
    }
    return own_sums(row, begin, count, context);
  }

  // Relative to the block's own maximum.
  TopkSums own_sums(int64_t row, int64_t begin, int count, const RowContext& context) const {
    alignas(64) float scratch[kRoom];
    const float* x = unstored(row, begin, count, scratch);
    const float highest = block_max(x, padded(count)), own = highest == -kInfinity ? 0.0f : highest;
    TopkSums sums = sums_of(row, begin, count, x, own, [=](Vf value) { return exp(value - own); }, context);
    sums.plain = false;
    if (sums.rest == 0) sums.reference = -INFINITY;
    return sums;
  }

  // The block's exponentials are kept where a gradient wants them.
  template <class T, class Exponential>
  TopkSums sums_of(int64_t row, int64_t begin, int count, const T* x, double reference, const Exponential& exponential,
                   const RowContext& context) const {
    alignas(64) float local[kRoom];
    float* e = keeps_ && context.keep ? exponentials(context) + begin : local;
    const Prefetch ahead = prefetch_ahead(problem_.student, row, context.next, begin, problem_.vocabulary);
    TopkSums sums;
    sums.reference = reference;
    if (problem_.tokens.labels != nullptr && temperature_ != 1.0f) {
      sums.label_sum = sum_untempered(x, padded(count), reference, temperature_);
    }
    sums.rest = sum_exponentials(x, padded(count), exponential, e, ahead);
    return sums;
  }

  // The normaliser of `sum`, relative to `reference`, and of the stored ids' values in `log_student`.
  Normaliser normaliser(const RowContext& context, double reference, double sum, double temperature) const {
    const double *x = log_student(context), *log_p = log_teacher(context);
    double high = sum == 0 ? -INFINITY : reference;
    for (int64_t j = 0; j < problem_.k; ++j) high = log_p[j] != -INFINITY && x[j] > high ? x[j] : high;
    double all = sum == 0 ? 0.0 : sum * std::exp(temperature * (reference - high));
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (log_p[j] != -INFINITY) all += std::exp(temperature * (x[j] - high));
    }
    return {high, std::log(all), temperature};
  }

  // Value and slope of every event; `slopes` gets ∂D/∂x of the stored ids, `log_student` their values.
  void events(int64_t row, const RowContext& context, Statistics& s) const {
    const double* log_p = log_teacher(context);
    double *x = log_student(context), *g = slopes(context);
    for (int64_t j = 0; j < problem_.k; ++j) x[j] = log_p[j] == -INFINITY ? -INFINITY : value_at(row, id(row, j));
    const bool renorm = problem_.tail == Tail::renorm;
    const double stored = log_sum(log_p);
    s.norm = normaliser(context, s.sums.reference, renorm ? 0.0 : s.sums.rest, 1.0);
    for (int64_t j = 0; j < problem_.k; ++j) {
      g[j] = 0;
      if (log_p[j] != -INFINITY) add_event(renorm ? log_p[j] - stored : log_p[j], s.norm.log_share(x[j]), s, g[j]);
    }
    if (problem_.tail == Tail::bucket) {
      const double mass = -std::expm1(stored), log_rest = std::log(s.sums.rest) + s.norm.log_share(s.sums.reference);
      const bool none = s.values.teacher_entropy.support == problem_.vocabulary || mass <= 0;
      add_event(none ? -INFINITY : std::log(mass), s.sums.rest == 0 ? -INFINITY : log_rest, s, s.rest_slope);
    }
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (log_p[j] != -INFINITY) g[j] -= expectation(std::exp(s.norm.log_share(x[j])), s.slope_sum);
    }
  }

  void add_event(double log_p, double log_q, Statistics& s, double& slope) const {
    const EventTerm event = event_term(problem_.divergence, problem_.beta, log_p, log_q);
    s.values.divergence += event.value;
    s.slope_sum += event.slope;
    slope = event.slope;
  }

  // Sets g at the stored ids of a block: a times the slopes plus b times the softmax that `log_student` has become.
  void stored_gradient(int64_t row, int64_t begin, int count, bool divergent, double a, bool labelled, double b,
                       const RowContext& context, float* g) const {
    for (int64_t j = 0; j < problem_.k; ++j) {
      const int64_t column = id(row, j) - begin;
      if (column < 0 || column >= count || log_teacher(context)[j] == -INFINITY) continue;
      const double slope = divergent ? a * slopes(context)[j] : 0.0;
      g[column] = static_cast<float>(slope + (labelled ? b * log_student(context)[j] : 0.0));
    }
  }

  const TopkKl& problem_;
  float temperature_;
  bool full_;
  bool keeps_;
};

inline void topk_kl(const TopkKl& problem, const Parallel& pool, const LossOutput& out) {
  forward(TopkKlRows(problem), problem.objective, problem.tokens, pool, out);
}

inline void topk_kl_backward(const TopkKl& problem, const Parallel& pool, const float* grad_loss, bool stream,
                             void* grad) {
  backward(TopkKlRows(problem), problem.objective, problem.tokens, pool, grad_loss, stream, grad);
}

}  // namespace e3::E3_ISA_NAMESPACE
