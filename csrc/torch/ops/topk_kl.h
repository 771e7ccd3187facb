// topk_kl and its gradient, which a tile of the linear loss writes in the place of the logits.
#pragma once

#include <cmath>

#include "torch/ops/loss.h"

namespace e3::ops {

// Of stored predictions and tokens without gaps, which the caller keeps.
inline TopkKl topk_kl_problem(const Tensor& student, const Tensor& logprobs, const Tensor& ids,
                              const OptionalTensor& labels, const OptionalTensor& mask, const Scalars& scalars,
                              int64_t weighting, int64_t divergence, int64_t ignore_index, int64_t tail,
                              int64_t reduction, const std::optional<double>& items) {
  const Rows student_rows = rows_of(student, "student");
  const int64_t count = student.size(0), vocabulary = student.size(1);
  for (const Tensor* stored : {&logprobs, &ids}) {
    STD_TORCH_CHECK(stored->dim() == 2 && stored->size(0) == count && stored->size(1) > 0,
                    "teacher_logprobs and teacher_ids must be (", count, ", k)");
  }
  STD_TORCH_CHECK(logprobs.size(1) == ids.size(1), "teacher_ids must have the shape of teacher_logprobs");
  STD_TORCH_CHECK(logprobs.scalar_type() == ScalarType::Float, "teacher_logprobs must be float32");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "teacher_ids must be int64");
  const TopkKl problem{vocabulary,
                       ids.size(1),
                       tokens_of(labels, mask, count, vocabulary, ignore_index),
                       student_rows,
                       static_cast<const float*>(logprobs.const_data_ptr()),
                       static_cast<const int64_t*>(ids.const_data_ptr()),
                       scalars.student(),
                       static_cast<Tail>(tail),
                       static_cast<Divergence>(divergence),
                       scalars.beta,
                       objective_of(scalars, weighting, reduction, items)};
  for (int64_t i = 0; i < count * problem.k; ++i) {
    const int64_t id = problem.teacher_ids[i];
    const bool used = problem.teacher_logprobs[i] != -INFINITY && problem.tokens.valid(i / problem.k);
    STD_TORCH_CHECK(!used || (id >= 0 && id < vocabulary), "teacher_ids must lie in [0, ", vocabulary, "), has ", id);
  }
  return problem;
}

template <Target kTarget>
std::tuple<Tensor, Tensor, Tensor> topk_kl(Tensor student, Tensor teacher_logprobs, Tensor teacher_ids,
                                           OptionalTensor labels, OptionalTensor token_mask, Tensor scalars,
                                           int64_t weighting, int64_t divergence, int64_t ignore_index, int64_t tail,
                                           int64_t reduction, OptionalTensor num_items, bool need_student) {
  const std::optional<double> items = number_of(num_items);
  teacher_logprobs = dense(teacher_logprobs), teacher_ids = dense(teacher_ids);
  labels = dense(labels), token_mask = dense(token_mask);
  const TopkKl problem =
      topk_kl_problem(student, teacher_logprobs, teacher_ids, labels, token_mask, scalars_of(scalars, false), weighting,
                      divergence, ignore_index, tail, reduction, items);
  const Loss result = new_loss(student, reduction, need_student, kTarget);
  kernels().topk_kl(problem, torch_pool(), result.output());
  return result.tuple();
}

template <Target kTarget>
Tensor topk_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher_logprobs, Tensor teacher_ids,
                        OptionalTensor labels, OptionalTensor token_mask, Tensor scalars, int64_t weighting,
                        int64_t divergence, int64_t ignore_index, int64_t tail) {
  teacher_logprobs = dense(teacher_logprobs), teacher_ids = dense(teacher_ids);
  labels = dense(labels), token_mask = dense(token_mask);
  const TopkKl problem =
      topk_kl_problem(student, teacher_logprobs, teacher_ids, labels, token_mask, scalars_of(scalars, false), weighting,
                      divergence, ignore_index, tail, 0, std::nullopt);
  const Tensor incoming = dense(grad_loss), grad = gradient_of(student, kTarget);
  kernels().topk_kl_backward(problem, torch_pool(),
                             vector_of<float>(incoming, ScalarType::Float, student.size(0), "grad_loss"),
                             kTarget == Target::fresh && streams(grad), grad.mutable_data_ptr());
  return grad;
}

}  // namespace e3::ops
