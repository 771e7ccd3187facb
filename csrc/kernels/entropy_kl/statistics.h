// What one token's loss and gradient need of its row of both models.
#pragma once

#include "kernels/entropy_kl/mixture.h"
#include "kernels/entropy_kl/sums.h"
#include "kernels/token_rows.h"

namespace e3::E3_ISA_NAMESPACE {

// The row of both models that a token compares, read block by block as fp32 padded by −∞.
class KlRow {
 public:
  KlRow(const EntropyKl& of, int64_t row, const RowContext& context) : problem(of), row(row), context(context) {}

  const EntropyKl& problem;
  const int64_t row;
  const RowContext context;

  const float* student(int64_t begin, int count, float* scratch) const {
    return load_block(problem.student, row, begin, count, problem.student_transform, scratch);
  }
  const float* teacher(int64_t begin, int count, float* scratch) const {
    return load_block(problem.teacher, row, begin, count, problem.teacher_transform, scratch);
  }
  float first_student() const { return first_max(problem.student, row, problem.vocabulary, problem.student_transform); }
  float first_teacher() const { return first_max(problem.teacher, row, problem.vocabulary, problem.teacher_transform); }
  float temperature() const { return problem.student_transform.temperature; }
  bool labelled() const { return problem.tokens.labels != nullptr; }
  int64_t label() const { return problem.tokens.labels[row]; }
  // The cross-entropy's softmax, at T = 1, has sums of its own.
  bool untempered() const { return labelled() && temperature() != 1.0f; }

  // Where the terms of the columns from `begin` on are kept for the gradient; lanes past their end may be read.
  template <Divergence D>
  Kept kept(int64_t begin) const {
    const int64_t stride = whole_steps(problem.vocabulary);
    float* at = context.scratch + begin;
    return {at, at + stride, at + (D == Divergence::adaptive ? 2 : 1) * stride};
  }
  template <Divergence D>
  static int64_t kept_floats(int64_t vocabulary) {
    return (D == Divergence::adaptive ? 3 : 2) * whole_steps(vocabulary) + kLanes;
  }
};

struct KlStatistics {
  TokenStats values;
  KlSums sums;
  JsdSums mixture;
  double share;  // α: D = α·KL(p‖q) + (1−α)·KL(q‖p)
  double reverse;  // KL(q‖p), 0 where it does not count
  bool kept;  // the terms of the row are in the scratch
};

inline Mixing mixing(const KlRow& row, const KlSums& sums) {
  const double beta = row.problem.beta;
  return {log_norm(sums.student_reference, sums.student_sum), log_norm(sums.teacher_reference, sums.teacher_sum),
          static_cast<float>(beta), static_cast<float>(1.0 - beta)};
}

template <Divergence D>
class KlStatisticsPass {
 public:
  explicit KlStatisticsPass(const KlRow& row) : row_(row), problem_(row.problem) {}

  TeacherEntropy teacher_entropy() const {
    const float first = row_.first_teacher();
    return entropy(fold([&](int64_t begin, int count) {
      alignas(64) float scratch[kRoom];
      if (serves_plain(first)) {
        const Prefetch ahead = prefetch_ahead(problem_.teacher, row_.row, row_.row + 1, begin, problem_.vocabulary);
        const KlSums sums =
            with_values(block_values(problem_.teacher, row_.row, begin, count, problem_.teacher_transform, scratch),
                        [&](const auto* xt) { return sum_teacher(xt, padded(count), first, ahead); });
        if (is_finite(sums)) return sums;
      }
      const float* xt = row_.teacher(begin, count, scratch);
      const float own = finite_reference(block_max(xt, padded(count)));
      return without_empty(sum_limits<Divergence::jsd>(xt, xt, padded(count), own, own));
    }));
  }

  template <class Before>
  KlStatistics statistics(Before& before) const {
    const References first{row_.first_student(), row_.first_teacher()};
    KlStatistics s{};
    s.sums = fold([&](int64_t begin, int count) {
      before(begin, count);
      return block_sums(begin, count, first);
    });
    if (!row_.untempered()) s.sums.label_sum = s.sums.student_sum;
    s.kept = row_.context.scratch != nullptr && s.sums.plain;
    s.values.teacher_entropy = entropy(s.sums);
    s.values.divergence = divergence(s);
    s.values.cross_entropy = row_.labelled() ? cross_entropy(s.sums) : 0.0;
    return s;
  }

 private:
  TeacherEntropy entropy(const KlSums& sums) const {
    return {std::log(sums.teacher_sum) - sums.teacher_energy / sums.teacher_sum, problem_.vocabulary};
  }

  template <class Part>
  KlSums fold(const Part& part) const {
    return fold_blocks<KlSums>(row_.context.pool, problem_.vocabulary, part,
                               [&](KlSums& total, const KlSums& sums) { join<D>(total, sums, row_.temperature()); });
  }

  KlSums block_sums(int64_t begin, int count, References first) const {
    alignas(64) float student[kRoom], teacher[kRoom];
    if (serves_plain(first.student) && serves_plain(first.teacher)) {
      const KlSums sums = plain_sums(begin, count, first, student, teacher);
      if (is_finite(sums)) return sums;
    }
    const float *xs = row_.student(begin, count, student), *xt = row_.teacher(begin, count, teacher);
    const float ms = finite_reference(block_max(xs, padded(count))),
                mt = finite_reference(block_max(xt, padded(count)));
    KlSums sums = sum_limits<D>(xs, xt, padded(count), ms, mt);
    if (row_.untempered()) sums.label_sum = sum_untempered(xs, padded(count), ms, row_.temperature());
    sums = without_empty(sums);
    sums.plain = false;
    return sums;
  }

  KlSums plain_sums(int64_t begin, int count, References m, float* student, float* teacher) const {
    const auto prefetch = [&](const Rows& rows) {
      return prefetch_ahead(rows, row_.row, row_.context.next, begin, problem_.vocabulary);
    };
    const Ahead ahead{prefetch(problem_.student), prefetch(problem_.teacher)};
    const auto values = [&](const Rows& rows, const Transform& transform, float* scratch) {
      return block_values(rows, row_.row, begin, count, transform, scratch);
    };
    BlockValues xs = values(problem_.student, problem_.student_transform, student);
    BlockValues xt = values(problem_.teacher, problem_.teacher_transform, teacher);
    if (xs.dtype != xt.dtype) {
      xs = {DType::float32, row_.student(begin, count, student)};
      xt = {DType::float32, row_.teacher(begin, count, teacher)};
    }
    KlSums sums = with_values(xs, [&](const auto* students) {
      const auto* teachers = static_cast<decltype(students)>(xt.data);
      if constexpr (D != Divergence::jsd) {
        if (row_.context.scratch != nullptr) {
          return sum_block<D, true>(students, teachers, padded(count), m, ahead, row_.kept<D>(begin));
        }
      }
      return sum_block<D, false>(students, teachers, padded(count), m, ahead, {});
    });
    if (row_.untempered()) {
      const float* loaded = row_.student(begin, count, student);
      sums.label_sum = sum_untempered(loaded, padded(count), sums.student_reference, row_.temperature());
    }
    return sums;
  }

  double divergence(KlStatistics& s) const {
    if constexpr (D == Divergence::jsd) {
      s.mixture = mixture(s.sums);
      return problem_.beta * s.mixture.teacher + (1.0 - problem_.beta) * s.mixture.student;
    }
    s.share = D == Divergence::adaptive ? s.values.teacher_entropy.share() : D == Divergence::forward ? 1.0 : 0.0;
    double value = 0;
    if constexpr (has_forward(D)) {
      value += term(s.share, kl(s.sums.forward, s.sums.teacher_reference, s.sums.teacher_sum, s.sums.student_sum));
    }
    if constexpr (has_reverse(D)) {
      if (s.share != 1.0)
        s.reverse = kl(s.sums.reverse, s.sums.student_reference, s.sums.student_sum, s.sums.teacher_sum);
      value += (1.0 - s.share) * s.reverse;
    }
    return value;
  }

  // +∞ where the first distribution has mass and the second none. Of a logit it has none where e^{x−m} is 0 even in
  // fp64.
  static double kl(const Cross& cross, double first_reference, double first_sum, double second_sum) {
    constexpr double kNoMass = -745.0;
    const double log_first = std::log(first_sum);
    if (cross.exposed - first_reference - log_first > kNoMass) return INFINITY;
    return cross.sum / first_sum + std::log(second_sum) - log_first;
  }

  JsdSums mixture(const KlSums& sums) const {
    const Mixing by = mixing(row_, sums);
    return fold_blocks<JsdSums>(
        row_.context.pool, problem_.vocabulary,
        [&](int64_t begin, int count) {
          alignas(64) float student[kRoom], teacher[kRoom];
          return sum_mixture(row_.student(begin, count, student), row_.teacher(begin, count, teacher), padded(count),
                             by);
        },
        [](JsdSums& total, const JsdSums& part) {
          total.teacher += part.teacher;
          total.student += part.student;
        });
  }

  double cross_entropy(const KlSums& sums) const {
    alignas(64) float scratch[kStep];
    const float* label = row_.student(row_.label(), 1, scratch);
    return std::log(sums.label_sum) + (sums.student_reference - *label) * row_.temperature();
  }

  const KlRow row_;
  const EntropyKl& problem_;
};

}  // namespace e3::E3_ISA_NAMESPACE
