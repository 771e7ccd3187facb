// What entropy_kl and topk_kl share: tokens, options, results.
#pragma once

#include <tuple>

#include "torch/ops/memory.h"

namespace e3::ops {

inline Tokens tokens_of(const OptionalTensor& labels, const OptionalTensor& mask, int64_t count, int64_t vocabulary,
                        int64_t ignore_index) {
  const Tokens tokens{count, vector_of<int64_t>(labels, ScalarType::Long, count, "labels"),
                      vector_of<bool>(mask, ScalarType::Bool, count, "token_mask"), ignore_index};
  for (int64_t token = 0; tokens.labels != nullptr && token < count; ++token) {
    const int64_t label = tokens.labels[token];
    STD_TORCH_CHECK(!tokens.valid(token) || (label >= 0 && label < vocabulary), "labels must lie in [0, ", vocabulary,
                    ") or be ignore_index; labels[", token, "] is ", label);
  }
  return tokens;
}

// The float options, in the order of docs/dispatcher.md.
struct Scalars {
  double temperature, gamma, kd_ratio, beta, student_softcap, student_scale, teacher_softcap, teacher_scale;
  Transform student() const { return transform(student_scale, student_softcap); }
  Transform teacher() const { return transform(teacher_scale, teacher_softcap); }

 private:
  Transform transform(double scale, double softcap) const {
    return {static_cast<float>(scale), static_cast<float>(softcap), static_cast<float>(temperature)};
  }
};

inline Scalars scalars_of(const Tensor& scalars, bool dense) {
  const double* s = doubles_of(scalars, dense ? 8 : 6);
  return {s[0], s[1], s[2], s[3], s[4], s[5], dense ? s[6] : 0.0, dense ? s[7] : 1.0};
}

inline Objective objective_of(const Scalars& s, int64_t weighting, int64_t reduction,
                              const std::optional<double>& items) {
  return {static_cast<Weighting>(weighting),    s.gamma, s.kd_ratio, s.temperature, static_cast<Reduction>(reduction),
          items.has_value() ? &*items : nullptr};
}

inline std::optional<double> number_of(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  STD_TORCH_CHECK(tensor->numel() == 1 && tensor->is_cpu(), "num_items must be one number on the CPU");
  const Tensor number = torch::stable::to(*tensor, ScalarType::Double);
  return *static_cast<const double*>(number.const_data_ptr());
}

// Whether the gradient of the student's logits is a tensor of its own, or replaces them.
enum class Target { fresh, in_place };

struct Loss {
  Tensor loss, stats, grad;
  bool stream;
  LossOutput output() const {
    void* target = grad.numel() == 0 ? nullptr : grad.mutable_data_ptr();
    return {static_cast<float*>(loss.mutable_data_ptr()), static_cast<float*>(stats.mutable_data_ptr()), target,
            stream};
  }
  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {loss, stats, grad}; }
};

inline Tensor gradient_of(const Tensor& student, Target target) {
  STD_TORCH_CHECK(target == Target::fresh || student.is_contiguous(), "student must be contiguous to be replaced");
  return target == Target::fresh ? new_like(student) : student;
}

inline Loss new_loss(const Tensor& student, int64_t reduction, bool need_student, Target target) {
  const int64_t rows = student.size(0);
  const bool per_token = reduction == static_cast<int64_t>(Reduction::none);
  const int64_t loss_shape[] = {rows}, stats_shape[] = {4, rows}, none[] = {0};
  return {new_empty({loss_shape, size_t{per_token}}, {1}, ScalarType::Float),
          new_empty({stats_shape, 2}, {rows, 1}, ScalarType::Float),
          need_student && !per_token ? gradient_of(student, target) : new_empty({none, 1}, {1}, student.scalar_type()),
          target == Target::fresh && streams(student)};
}

}  // namespace e3::ops
