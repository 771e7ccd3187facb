// Divergence of a student from k stored log-probabilities of a teacher a token, with gradient.
//
// x = f(z)/T of the student, m a reference of its row, E = e^{x−m}; "stored" are the ids whose log-probability is not −∞:
//
//   bucket     k + 1 events: the stored ids and all others;  p_rest = 1 − Σp,  q_rest = Σ_{not stored} E / Σ E
//   renorm     k events, both sides renormalised over the stored ids
//   truncated  Σ p(log p − log q) over the stored ids; not a divergence
//
// With g_j = ∂D/∂log q_j of event j and G = Σ g_j:
//
//   bucket     ∂D/∂x_i = [i stored] Σ_{j: id_j = i} g_j + [i not stored] g_rest·E_i/Σ_{not stored}E − G·E_i/ΣE
//   truncated  the same without g_rest;   renorm: ΣE over the stored ids only, 0 elsewhere
//
// The rest is summed over the ids that are not stored (in the scratch they are taken out of the block), since 1 − Σq
// cancels when little is left. The row is read once and stays in the cache for the gradient.
#pragma once

#include "simd/block.h"
#include "kernels/token_loss.h"

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

// Sums of E over blocks relative to a reference; `stored` counts an id once however often it is stored.
struct TopkSums {
  double reference = -INFINITY;
  double rest = 0;
  double stored = 0;
  double label_sum = 0;  // Σ e^{T·(x−m)}
  int64_t rest_count = 0;
  bool plain = true;
};

inline void join(TopkSums& total, TopkSums part, double temperature) {
  if (total.reference != part.reference) {
    const double reference = std::fmax(total.reference, part.reference);
    for (TopkSums* sums : {&total, &part}) {
      const double by = sums->rest + sums->stored == 0 ? 0.0 : sums->reference - reference;
      sums->rest *= std::exp(by);
      sums->stored *= std::exp(by);
      sums->label_sum *= std::exp(temperature * by);
      sums->reference = reference;
    }
  }
  total.rest += part.rest;
  total.stored += part.stored;
  total.label_sum += part.label_sum;
  total.rest_count += part.rest_count;
  total.plain &= part.plain;
}

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

inline float sum_values(const float* x, int count) {
  Vf sum[2] = {};
  for (int i = 0; i < count; i += kStep) {
    for (int chain = 0; chain < 2; ++chain) sum[chain] += load(x + i + chain * kLanes);
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
    double slope_sum;   // G
    double rest_slope;  // g_rest
  };

  explicit TopkKlRows(const TopkKl& problem)
      : problem_(problem),
        temperature_(problem.transform.temperature),
        full_(problem.tail != Tail::renorm || problem.tokens.labels != nullptr),
        keeps_(full_ && problem.transform.softcap <= 0 && problem.vocabulary <= kKeptColumns &&
               (temperature_ == 1.0f || problem.tokens.labels == nullptr)) {}

  int64_t support() const { return problem_.k; }
  int64_t columns() const { return problem_.vocabulary; }
  int64_t row_bytes() const { return problem_.vocabulary * size_of(problem_.student.dtype); }

  // Two doubles a stored id, then, for a gradient that is a multiple of them, the row's exponentials and room past its end.
  int64_t scratch_floats(bool need_grad) const {
    const int64_t row = (problem_.vocabulary + kStep - 1) / kStep * kStep;
    return id_floats() + (need_grad && keeps_ ? row + kLanes : 0);
  }

  double teacher_entropy(int64_t row, const RowContext&) const {
    const float* log_p = problem_.teacher_logprobs + row * problem_.k;
    const double log_norm = log_sum(problem_.k, [&](int64_t j) { return static_cast<double>(log_p[j]); });
    double entropy = 0;
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (is_stored(row, j)) entropy -= std::exp(log_p[j] - log_norm) * (log_p[j] - log_norm);
    }
    return entropy;
  }

  template <class Before>
  Statistics statistics(int64_t row, const RowContext& context, Before& before) const {
    Statistics s{};
    if (full_) {
      const float first = first_max(problem_.student, row, problem_.vocabulary, problem_.transform);
      s.sums = fold_blocks<TopkSums>(
          context.pool, problem_.vocabulary,
          [&](int64_t begin, int count) {
            before(begin, count);
            return block_sums(row, begin, count, first, context);
          },
          [&](TopkSums& total, const TopkSums& part) { join(total, part, temperature_); });
      if (temperature_ == 1.0f) s.sums.label_sum = s.sums.rest + s.sums.stored;
    } else {
      before.finish();
    }
    s.values.teacher_entropy = teacher_entropy(row, context);
    problem_.tail == Tail::renorm ? renormalised_events(row, context, s) : events(row, context, s);
    if (problem_.tokens.labels != nullptr) {
      const double label = value_at(row, problem_.tokens.labels[row]);
      s.values.cross_entropy = std::log(s.sums.label_sum) + (s.sums.reference - label) * temperature_;
    }
    return s;
  }

  auto gradient(int64_t row, const Statistics& s, const Coefficients& c, const RowContext& context, bool stream_out,
                void* target) const {
    const double a = c.divergence / temperature_;
    const bool labelled = problem_.tokens.labels != nullptr && c.cross_entropy != 0.0;
    const double b = labelled && temperature_ == 1.0f ? c.cross_entropy / s.sums.label_sum : 0.0;
    const bool divergent = problem_.tail != Tail::renorm && c.divergent;
    const double slope = b - (divergent ? a * s.slope_sum / (s.sums.rest + s.sums.stored) : 0.0);
    const double rest = divergent && s.sums.rest != 0 ? a * s.rest_slope / s.sums.rest : 0.0;
    const Rounded reference(s.sums.reference);
    const DType dtype = problem_.student.dtype;
    // What the kept exponentials are multiplied by; stored ids and the label, which differ, are put in as multiples of it.
    const double common = slope + rest, unit = 1.0 / common;
    const bool kept = keeps_ && s.sums.plain && std::fabs(unit) < 1e30;
    return [=, this](int64_t begin, int count) {
      const int64_t label = labelled ? problem_.tokens.labels[row] - begin : -1;
      const bool labelled_here = label >= 0 && label < count;
      if (kept) {
        float* e = exponentials(context) + begin;
        stored_gradient(row, begin, count, c.divergent, a * unit, slope * unit, s.sums.reference, context, e);
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
      stored_gradient(row, begin, count, c.divergent, a, slope, s.sums.reference, context, g);
      if (labelled && temperature_ != 1.0f) {
        const float hard = static_cast<float>(c.cross_entropy / s.sums.label_sum);
        exponential_gradient(x, padded(count), reference, temperature_, hard, true, g);
      }
      if (labelled_here) g[label] -= static_cast<float>(c.cross_entropy);
      transform_gradient(x, count, problem_.transform, g);
      store_block(g, count, dtype, stream_out, target, begin);
    };
  }

 private:
  static constexpr int64_t kKeptColumns = 1 << 18;

  int64_t id_floats() const { return (4 * problem_.k + 15) / 16 * 16; }
  double* slopes(const RowContext& context) const { return reinterpret_cast<double*>(context.scratch); }
  double* log_student(const RowContext& context) const { return slopes(context) + problem_.k; }
  float* exponentials(const RowContext& context) const { return context.scratch + id_floats(); }

  bool is_stored(int64_t row, int64_t j) const { return problem_.teacher_logprobs[row * problem_.k + j] != -INFINITY; }
  int64_t id(int64_t row, int64_t j) const { return problem_.teacher_ids[row * problem_.k + j]; }

  bool holds_stored(int64_t row, int64_t begin, int count) const {
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (id(row, j) >= begin && id(row, j) < begin + count && is_stored(row, j)) return true;
    }
    return false;
  }

  // log Σ e^value(j), −∞ for none.
  template <class Value>
  static double log_sum(int64_t count, const Value& value) {
    double high = -INFINITY, sum = 0;
    for (int64_t j = 0; j < count; ++j) high = value(j) > high ? value(j) : high;
    for (int64_t j = 0; j < count; ++j) sum += value(j) == -INFINITY ? 0.0 : std::exp(value(j) - high);
    return sum == 0 ? -INFINITY : high + std::log(sum);
  }

  float value_at(int64_t row, int64_t column) const {
    alignas(64) float scratch[kStep];
    return *load_block(problem_.student, row, column, 1, problem_.transform, scratch);
  }

  TopkSums block_sums(int64_t row, int64_t begin, int count, float first, const RowContext& context) const {
    alignas(64) float scratch[kRoom], local[kRoom];
    const bool keep = keeps_ && context.keep;
    float* e = keep ? exponentials(context) + begin : local;
    const Prefetch ahead = prefetch_ahead(problem_.student, row, context.next, begin, problem_.vocabulary);
    if (std::isfinite(first)) {
      const TopkSums sums = with_values(
          block_values(problem_.student, row, begin, count, problem_.transform, scratch), [&](const auto* x) {
            using T = std::decay_t<decltype(*x)>;
            const Reference<T> m(first);
            const auto exponential = [=](Vf value) { return exp2<T>(m.bits_above(value)); };
            return sums_of(row, begin, count, x, m.value(), exponential, e, ahead);
          });
      if (std::isfinite(sums.rest + sums.stored + sums.label_sum)) return sums;
    }
    const float* x = load_block(problem_.student, row, begin, count, problem_.transform, scratch);
    const float highest = block_max(x, padded(count)), own = highest == -kInfinity ? 0.0f : highest;
    const auto exponential = [=](Vf value) { return exp(value - own); };
    TopkSums sums = sums_of(row, begin, count, x, own, exponential, e, ahead);
    sums.plain = false;
    if (sums.rest + sums.stored == 0) sums.reference = -INFINITY;
    return sums;
  }

  // `e` gets the block's exponentials, relative to `reference`, 0 at the stored ids.
  template <class T, class Exponential>
  TopkSums sums_of(int64_t row, int64_t begin, int count, const T* x, double reference, const Exponential& exponential,
                   float* e, Prefetch ahead) const {
    TopkSums sums;
    sums.reference = reference;
    sums.rest_count = count;
    if (problem_.tokens.labels != nullptr && temperature_ != 1.0f) {
      sums.label_sum = sum_untempered(x, padded(count), reference, temperature_);
    }
    sums.rest = sum_exponentials(x, padded(count), exponential, e, ahead);
    if (!holds_stored(row, begin, count)) return sums;
    constexpr float kTaken = -1.0f;
    for (int64_t j = 0; j < problem_.k; ++j) {
      const int64_t column = id(row, j) - begin;
      if (column < 0 || column >= count || !is_stored(row, j) || e[column] == kTaken) continue;
      sums.stored += e[column];
      e[column] = kTaken;
      --sums.rest_count;
    }
    for (int64_t j = 0; j < problem_.k; ++j) {
      const int64_t column = id(row, j) - begin;
      if (column >= 0 && column < count && is_stored(row, j)) e[column] = 0.0f;
    }
    sums.rest = sum_values(e, padded(count));
    return sums;
  }

  // Value and slope of every event; `slopes` gets g_j.
  void events(int64_t row, const RowContext& context, Statistics& s) const {
    const float* log_p = problem_.teacher_logprobs + row * problem_.k;
    const double log_norm = std::log(s.sums.rest + s.sums.stored);
    for (int64_t j = 0; j < problem_.k; ++j) {
      const double log_q = is_stored(row, j) ? value_at(row, id(row, j)) - s.sums.reference - log_norm : -INFINITY;
      add_event(log_p[j], log_q, s, slopes(context)[j]);
    }
    if (problem_.tail == Tail::truncated) return;
    const double stored = log_sum(problem_.k, [&](int64_t j) { return static_cast<double>(log_p[j]); });
    const double mass = -std::expm1(stored);
    const double log_rest = s.sums.rest_count == 0 || mass <= 0 ? -INFINITY : std::log(mass);
    add_event(log_rest, std::log(s.sums.rest) - log_norm, s, s.rest_slope);
  }

  // The same over the stored ids alone, where `slopes` gets the whole gradient g_j − q_j·G.
  void renormalised_events(int64_t row, const RowContext& context, Statistics& s) const {
    const float* log_p = problem_.teacher_logprobs + row * problem_.k;
    double* log_q = log_student(context);
    for (int64_t j = 0; j < problem_.k; ++j) log_q[j] = is_stored(row, j) ? value_at(row, id(row, j)) : -INFINITY;
    const double student = log_sum(problem_.k, [&](int64_t j) { return log_q[j]; });
    const double teacher = log_sum(problem_.k, [&](int64_t j) { return static_cast<double>(log_p[j]); });
    for (int64_t j = 0; j < problem_.k; ++j) {
      log_q[j] = is_stored(row, j) ? log_q[j] - student : -INFINITY;
      add_event(is_stored(row, j) ? log_p[j] - teacher : -INFINITY, log_q[j], s, slopes(context)[j]);
    }
    for (int64_t j = 0; j < problem_.k; ++j) slopes(context)[j] -= expectation(std::exp(log_q[j]), s.slope_sum);
  }

  void add_event(double log_p, double log_q, Statistics& s, double& slope) const {
    const EventTerm event = event_term(problem_.divergence, problem_.beta, log_p, log_q);
    s.values.divergence += event.value;
    s.slope_sum += event.slope;
    slope = event.slope;
  }

  // Sets g at the stored ids of a block, where what E is multiplied by is `slope` alone and each event adds its own.
  void stored_gradient(int64_t row, int64_t begin, int count, bool divergent, double a, double slope, double reference,
                       const RowContext& context, float* g) const {
    for (const bool first : {true, false}) {
      for (int64_t j = 0; j < problem_.k; ++j) {
        const int64_t column = id(row, j) - begin;
        if (column < 0 || column >= count || !is_stored(row, j)) continue;
        if (first) {
          const double e = slope == 0.0 ? 0.0 : std::exp(static_cast<double>(value_at(row, id(row, j))) - reference);
          g[column] = static_cast<float>(slope * e);
        } else if (divergent) {
          g[column] += static_cast<float>(a * slopes(context)[j]);
        }
      }
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
