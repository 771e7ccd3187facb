// entropy_kl and its gradient, which a tile of the linear loss writes in the place of the logits.
#pragma once

#include "torch/ops/loss.h"

namespace e3::ops {

inline EntropyKl entropy_kl_problem(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                                    const OptionalTensor& mask, const Scalars& scalars, int64_t weighting,
                                    int64_t divergence, int64_t ignore_index, int64_t reduction,
                                    const std::optional<double>& items) {
  const Rows student_rows = rows_of(student, "student"), teacher_rows = rows_of(teacher, "teacher");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "teacher must have the student's shape");
  return {student.size(1),
          tokens_of(labels, mask, student.size(0), student.size(1), ignore_index),
          student_rows,
          teacher_rows,
          scalars.student(),
          scalars.teacher(),
          static_cast<Divergence>(divergence),
          scalars.beta,
          objective_of(scalars, weighting, reduction, items)};
}

template <Target kTarget>
std::tuple<Tensor, Tensor, Tensor> entropy_kl(Tensor student, Tensor teacher, OptionalTensor labels,
                                              OptionalTensor token_mask, Tensor scalars, int64_t weighting,
                                              int64_t divergence, int64_t ignore_index, int64_t reduction,
                                              OptionalTensor num_items, bool need_student) {
  const std::optional<double> items = number_of(num_items);
  labels = dense(labels), token_mask = dense(token_mask);
  const EntropyKl problem = entropy_kl_problem(student, teacher, labels, token_mask, scalars_of(scalars, true),
                                               weighting, divergence, ignore_index, reduction, items);
  const Loss result = new_loss(student, reduction, need_student, kTarget);
  kernels().entropy_kl(problem, torch_pool(), result.output());
  return result.tuple();
}

template <Target kTarget>
Tensor entropy_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, OptionalTensor labels,
                           OptionalTensor token_mask, Tensor scalars, int64_t weighting, int64_t divergence,
                           int64_t ignore_index) {
  labels = dense(labels), token_mask = dense(token_mask);
  const EntropyKl problem = entropy_kl_problem(student, teacher, labels, token_mask, scalars_of(scalars, true),
                                               weighting, divergence, ignore_index, 0, std::nullopt);
  const Tensor incoming = dense(grad_loss), grad = gradient_of(student, kTarget);
  kernels().entropy_kl_backward(problem, torch_pool(),
                                vector_of<float>(incoming, ScalarType::Float, student.size(0), "grad_loss"),
                                kTarget == Target::fresh && streams(grad), grad.mutable_data_ptr());
  return grad;
}

}  // namespace e3::ops
