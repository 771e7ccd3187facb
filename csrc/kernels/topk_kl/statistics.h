// What one token's loss and gradient need of its row and of what is stored of its teacher.
#pragma once

#include "kernels/token_rows.h"
#include "kernels/topk_kl/events.h"
#include "kernels/topk_kl/sums.h"

namespace e3::E3_ISA_NAMESPACE {

// A token's row of logits and its stored ids. The scratch holds three doubles a stored id, then, for a gradient that is
// a multiple of them, the row's exponentials and room past its end.
class TopkRow {
 public:
  TopkRow(const TopkKl& of, int64_t row, const RowContext& context) : problem(of), row(row), context(context) {}

  const TopkKl& problem;
  const int64_t row;
  const RowContext context;

  static int64_t scratch_floats(const TopkKl& problem, bool need_grad) {
    return id_floats(problem) + (need_grad && keeps(problem) ? whole_steps(problem.vocabulary) + kLanes : 0);
  }
  double* slopes() const { return reinterpret_cast<double*>(context.scratch); }
  double* log_student() const { return slopes() + problem.k; }
  double* log_teacher() const { return log_student() + problem.k; }
  float* exponentials() const { return context.scratch + id_floats(problem); }

  float temperature() const { return problem.transform.temperature; }
  bool labelled() const { return problem.tokens.labels != nullptr; }
  int64_t label() const { return problem.tokens.labels[row]; }
  // Whether the row's own normaliser is needed.
  bool full() const { return is_full(problem); }
  bool keeps() const { return keeps(problem); }

  float log_p(int64_t j) const { return problem.teacher_logprobs[row * problem.k + j]; }
  int64_t id(int64_t j) const { return problem.teacher_ids[row * problem.k + j]; }
  bool is_stored(int64_t j) const { return log_p(j) != -INFINITY; }

  // Whether an earlier place of the row stores the same id; all of them are looked at, several at a time.
  bool is_repeated(int64_t j) const {
    bool found = false;
    for (int64_t i = 0; i < j; ++i) found |= (id(i) == id(j)) & is_stored(i);
    return found;
  }

  bool holds_stored(int64_t begin, int count) const {
    for (int64_t j = 0; j < problem.k; ++j) {
      if (id(j) >= begin && id(j) < begin + count && is_stored(j)) return true;
    }
    return false;
  }

  const float* student(int64_t begin, int count, float* scratch) const {
    return load_block(problem.student, row, begin, count, problem.transform, scratch);
  }
  float value_at(int64_t column) const {
    alignas(64) float scratch[kStep];
    return *student(column, 1, scratch);
  }

 private:
  static bool is_full(const TopkKl& problem) {
    return problem.tail != Tail::renorm || problem.tokens.labels != nullptr;
  }
  static bool keeps(const TopkKl& problem) {
    constexpr int64_t kKeptColumns = 1 << 18;
    return is_full(problem) && problem.transform.softcap <= 0 && problem.vocabulary <= kKeptColumns &&
           (problem.transform.temperature == 1.0f || problem.tokens.labels == nullptr);
  }
  static int64_t id_floats(const TopkKl& problem) { return (6 * problem.k + 15) / 16 * 16; }
};

struct TopkStatistics {
  TokenStats values;
  double share;  // α of the adaptive divergence
  TopkSums sums;
  Normaliser norm;  // of q
  Normaliser label_norm;  // of the softmax at T = 1
  double slope_sum;  // G
  double rest_slope;  // g_rest
};

class TopkStatisticsPass {
 public:
  explicit TopkStatisticsPass(const TopkRow& row) : row_(row), problem_(row.problem) {}

  // The entropy of the stored probabilities, renormalised; `log_teacher` gets the row, −∞ where nothing is stored.
  TeacherEntropy teacher_entropy() const {
    double* log_p = row_.log_teacher();
    TeacherEntropy entropy{0.0, 0};
    for (int64_t j = 0; j < problem_.k; ++j) {
      const bool counts = row_.is_stored(j) && !row_.is_repeated(j);
      log_p[j] = counts ? row_.log_p(j) : -INFINITY;
      entropy.support += counts;
    }
    const double norm = log_sum(log_p);
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (log_p[j] != -INFINITY) entropy.value -= term(std::exp(log_p[j] - norm), log_p[j] - norm);
    }
    return entropy;
  }

  template <class Before>
  TopkStatistics statistics(Before& before) const {
    TopkStatistics s{};
    if (row_.full()) {
      s.sums = unstored_sums(before);
    } else {
      before.finish();
    }
    s.values.teacher_entropy = teacher_entropy();
    if (problem_.divergence == Divergence::adaptive) s.share = s.values.teacher_entropy.share();
    events(s);
    if (row_.labelled()) {
      s.label_norm = normaliser(s.sums.reference, s.sums.label_sum, row_.temperature());
      s.values.cross_entropy = -s.label_norm.log_share(row_.value_at(row_.label()));
      for (int64_t j = 0; j < problem_.k; ++j) {
        double& x = row_.log_student()[j];
        x = std::exp(s.label_norm.log_share(x));
      }
    }
    return s;
  }

 private:
  static constexpr double kTooLittle = 1e-20;  // of a sum of fp32 exponentials: below it terms that matter may be lost

  template <class Before>
  TopkSums unstored_sums(Before& before) const {
    const float first = first_max(problem_.student, row_.row, problem_.vocabulary, problem_.transform);
    const auto joined = [&](const auto& part) {
      return fold_blocks<TopkSums>(
          row_.context.pool, problem_.vocabulary, part,
          [&](TopkSums& total, const TopkSums& sums) { join(total, sums, row_.temperature()); });
    };
    TopkSums sums = joined([&](int64_t begin, int count) {
      before(begin, count);
      return block_sums(begin, count, first);
    });
    if (sums.plain && sums.rest < kTooLittle) {  // the reference was a stored id's, far above all others
      sums = joined([&](int64_t begin, int count) { return own_sums(begin, count); });
    }
    if (row_.temperature() == 1.0f) sums.label_sum = sums.rest;
    return sums;
  }

  // log Σ e^value of the k values, −∞ for none.
  double log_sum(const double* values) const {
    double high = -INFINITY, sum = 0;
    for (int64_t j = 0; j < problem_.k; ++j) high = values[j] > high ? values[j] : high;
    for (int64_t j = 0; j < problem_.k; ++j) sum += values[j] == -INFINITY ? 0.0 : std::exp(values[j] - high);
    return sum == 0 ? -INFINITY : high + std::log(sum);
  }

  // The columns of a block, −∞ at the stored ids, in `scratch`.
  const float* unstored(int64_t begin, int count, float* scratch) const {
    const float* x = row_.student(begin, count, scratch);
    if (x != scratch) std::memcpy(scratch, x, sizeof(float) * count);
    for (int64_t j = 0; j < problem_.k; ++j) {
      const int64_t column = row_.id(j) - begin;
      if (column >= 0 && column < count && row_.is_stored(j)) scratch[column] = -kInfinity;
    }
    return scratch;
  }

  TopkSums block_sums(int64_t begin, int count, float first) const {
    if (serves_plain(first)) {
      alignas(64) float scratch[kRoom];
      const BlockValues values =
          row_.holds_stored(begin, count)
              ? BlockValues{DType::float32, unstored(begin, count, scratch)}
              : block_values(problem_.student, row_.row, begin, count, problem_.transform, scratch);
      const TopkSums sums = with_values(values, [&](const auto* x) {
        using T = std::decay_t<decltype(*x)>;
        const Reference<T> m(first);
        return sums_of(begin, count, x, m.value(), [=](Vf value) { return exp2<T>(m.bits_above(value)); });
      });
      if (std::isfinite(sums.rest + sums.label_sum)) return sums;
    }
    return own_sums(begin, count);
  }

  // Relative to the block's own maximum.
  TopkSums own_sums(int64_t begin, int count) const {
    alignas(64) float scratch[kRoom];
    const float* x = unstored(begin, count, scratch);
    const float highest = block_max(x, padded(count)), own = highest == -kInfinity ? 0.0f : highest;
    TopkSums sums = sums_of(begin, count, x, own, [=](Vf value) { return exp(value - own); });
    sums.plain = false;
    if (sums.rest == 0) sums.reference = -INFINITY;
    return sums;
  }

  // The block's exponentials are kept where a gradient wants them.
  template <class T, class Exponential>
  TopkSums sums_of(int64_t begin, int count, const T* x, double reference, const Exponential& exponential) const {
    alignas(64) float local[kRoom];
    float* e = row_.keeps() && row_.context.keep ? row_.exponentials() + begin : local;
    const Prefetch ahead = prefetch_ahead(problem_.student, row_.row, row_.context.next, begin, problem_.vocabulary);
    TopkSums sums;
    sums.reference = reference;
    if (row_.labelled() && row_.temperature() != 1.0f) {
      sums.label_sum = sum_untempered(x, padded(count), reference, row_.temperature());
    }
    sums.rest = sum_exponentials(x, padded(count), exponential, e, ahead);
    return sums;
  }

  // The normaliser of `sum`, relative to `reference`, and of the stored ids' values in `log_student`.
  Normaliser normaliser(double reference, double sum, double temperature) const {
    const double *x = row_.log_student(), *log_p = row_.log_teacher();
    double high = sum == 0 ? -INFINITY : reference;
    for (int64_t j = 0; j < problem_.k; ++j) high = log_p[j] != -INFINITY && x[j] > high ? x[j] : high;
    double all = sum == 0 ? 0.0 : sum * std::exp(temperature * (reference - high));
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (log_p[j] != -INFINITY) all += std::exp(temperature * (x[j] - high));
    }
    return {high, std::log(all), temperature};
  }

  // Value and slope of every event; `slopes` gets ∂D/∂x of the stored ids, `log_student` their values.
  void events(TopkStatistics& s) const {
    const double* log_p = row_.log_teacher();
    double *x = row_.log_student(), *g = row_.slopes();
    for (int64_t j = 0; j < problem_.k; ++j) x[j] = log_p[j] == -INFINITY ? -INFINITY : row_.value_at(row_.id(j));
    const bool renorm = problem_.tail == Tail::renorm;
    const double stored = log_sum(log_p);
    s.norm = normaliser(s.sums.reference, renorm ? 0.0 : s.sums.rest, 1.0);
    for (int64_t j = 0; j < problem_.k; ++j) {
      g[j] = 0;
      if (log_p[j] != -INFINITY) add_event(renorm ? log_p[j] - stored : log_p[j], s.norm.log_share(x[j]), s, g[j]);
    }
    if (problem_.tail == Tail::bucket) {
      const double mass = rest_of_teacher(stored, s),
                   log_rest = std::log(s.sums.rest) + s.norm.log_share(s.sums.reference);
      add_event(mass <= 0 ? -INFINITY : std::log(mass), s.sums.rest == 0 ? -INFINITY : log_rest, s, s.rest_slope);
    }
    for (int64_t j = 0; j < problem_.k; ++j) {
      if (log_p[j] != -INFINITY) g[j] -= term(std::exp(s.norm.log_share(x[j])), s.slope_sum);
    }
  }

  // The teacher's probability of all ids that are not stored, from the logarithm of that of those that are. What is
  // stored is rounded: where KL(q‖p) counts and the student has mass there, it is taken for no less than can be told.
  double rest_of_teacher(double stored, const TopkStatistics& s) const {
    constexpr double kResolution = 0x1p-24;
    if (s.values.teacher_entropy.support == problem_.vocabulary) return 0.0;
    const double mass = -std::expm1(stored);
    return has_reverse(problem_.divergence) && s.sums.rest != 0 && mass < kResolution ? kResolution : mass;
  }

  void add_event(double log_p, double log_q, TopkStatistics& s, double& slope) const {
    const EventTerm event = event_term(problem_.divergence, problem_.beta, s.share, log_p, log_q);
    s.values.divergence += event.value;
    s.slope_sum += event.slope;
    slope = event.slope;
  }

  const TopkRow row_;
  const TopkKl& problem_;
};

}  // namespace e3::E3_ISA_NAMESPACE
