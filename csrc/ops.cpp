// torch.ops.e3.*.native: the kernels of this folder on torch's stable ABI. Schemas, fakes and autograd formulas are
// defined in e3kernels/ops; docs/dispatcher.md lists them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "kernels/ops_table.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A gradient larger than this is written past the caches: whoever reads it next finds it in memory anyway.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

const e3::OpsTable& kernels() {
  static const e3::OpsTable& table = e3::choose_table();
  return table;
}

e3::Parallel torch_pool() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

e3::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return e3::DType::float32;
    case ScalarType::BFloat16: return e3::DType::bfloat16;
    case ScalarType::Half: return e3::DType::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the native backend");
  }
}

e3::Rows rows_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, has ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(1) > 0, name, " must have columns");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name, " must have contiguous rows");
  return {dtype_of(tensor, name), tensor.const_data_ptr(), tensor.stride(0)};
}

template <class T>
const T* vector_of(const OptionalTensor& tensor, ScalarType dtype, int64_t length, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == dtype && tensor->dim() == 1 && tensor->size(0) == length &&
                      tensor->is_contiguous(),
                  name, " must be a contiguous vector of ", length, " values of the dtype in docs/dispatcher.md");
  return static_cast<const T*>(tensor->const_data_ptr());
}

e3::Tokens tokens_of(const OptionalTensor& labels, const OptionalTensor& mask, int64_t count, int64_t vocabulary,
                     int64_t ignore_index) {
  const e3::Tokens tokens{count, vector_of<int64_t>(labels, ScalarType::Long, count, "labels"),
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
  e3::Transform student() const { return transform(student_scale, student_softcap); }
  e3::Transform teacher() const { return transform(teacher_scale, teacher_softcap); }

 private:
  e3::Transform transform(double scale, double softcap) const {
    return {static_cast<float>(scale), static_cast<float>(softcap), static_cast<float>(temperature)};
  }
};

const double* doubles_of(const Tensor& scalars, int64_t count) {
  STD_TORCH_CHECK(scalars.scalar_type() == ScalarType::Double && scalars.numel() == count && scalars.is_contiguous(),
                  "scalars must be ", count, " contiguous float64 values");
  return static_cast<const double*>(scalars.const_data_ptr());
}

Scalars scalars_of(const Tensor& scalars, bool dense) {
  const double* s = doubles_of(scalars, dense ? 8 : 6);
  return {s[0], s[1], s[2], s[3], s[4], s[5], dense ? s[6] : 0.0, dense ? s[7] : 1.0};
}

e3::Objective objective_of(const Scalars& s, int64_t weighting, int64_t reduction, const std::optional<double>& items) {
  return {static_cast<e3::Weighting>(weighting), s.gamma, s.kd_ratio, s.temperature,
          static_cast<e3::Reduction>(reduction), items.has_value() ? &*items : nullptr};
}

std::optional<double> number_of(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  const Tensor number = torch::stable::to(*tensor, ScalarType::Double);
  STD_TORCH_CHECK(number.numel() == 1, "num_items must be one number");
  return *static_cast<const double*>(number.const_data_ptr());
}

struct Loss {
  Tensor loss, stats, grad;
  e3::LossOutput output() const {
    void* target = grad.numel() == 0 ? nullptr : grad.mutable_data_ptr();
    const bool stream = grad.numel() * static_cast<int64_t>(grad.element_size()) >= kStreamBytes;
    return {static_cast<float*>(loss.mutable_data_ptr()), static_cast<float*>(stats.mutable_data_ptr()), target, stream};
  }
  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {loss, stats, grad}; }
};

Loss new_loss(const Tensor& student, int64_t reduction, bool need_grad) {
  const int64_t rows = student.size(0), columns = student.size(1);
  const bool per_token = reduction == static_cast<int64_t>(e3::Reduction::none);
  const int64_t loss_shape[] = {rows}, stats_shape[] = {4, rows}, grad_shape[] = {rows, columns}, none[] = {0};
  return {torch::stable::new_empty(student, {loss_shape, size_t{per_token}}, ScalarType::Float),
          torch::stable::new_empty(student, {stats_shape, 2}, ScalarType::Float),
          need_grad ? torch::stable::new_empty(student, {grad_shape, 2}) : torch::stable::new_empty(student, {none, 1})};
}

Tensor new_grad(const Tensor& student) {
  const int64_t shape[] = {student.size(0), student.size(1)};
  return torch::stable::new_empty(student, {shape, 2});
}

bool streams(const Tensor& grad) { return grad.numel() * static_cast<int64_t>(grad.element_size()) >= kStreamBytes; }

e3::EntropyKl entropy_kl_problem(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels,
                                 const OptionalTensor& mask, const Scalars& scalars, int64_t weighting,
                                 int64_t divergence, int64_t ignore_index, int64_t reduction,
                                 const std::optional<double>& items) {
  const e3::Rows student_rows = rows_of(student, "student"), teacher_rows = rows_of(teacher, "teacher");
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "teacher must have the student's shape");
  return {student.size(1),
          tokens_of(labels, mask, student.size(0), student.size(1), ignore_index),
          student_rows,
          teacher_rows,
          scalars.student(),
          scalars.teacher(),
          static_cast<e3::Divergence>(divergence),
          scalars.beta,
          objective_of(scalars, weighting, reduction, items)};
}

std::tuple<Tensor, Tensor, Tensor> entropy_kl(Tensor student, Tensor teacher, OptionalTensor labels,
                                              OptionalTensor token_mask, Tensor scalars, int64_t weighting,
                                              int64_t divergence, int64_t ignore_index, int64_t reduction,
                                              OptionalTensor num_items, bool need_student) {
  const std::optional<double> items = number_of(num_items);
  const e3::EntropyKl problem =
      entropy_kl_problem(student, teacher, labels, token_mask, scalars_of(scalars, true), weighting, divergence,
                         ignore_index, reduction, items);
  const Loss result = new_loss(student, reduction, need_student && reduction != 0);
  kernels().entropy_kl(problem, torch_pool(), result.output());
  return result.tuple();
}

Tensor entropy_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, OptionalTensor labels,
                           OptionalTensor token_mask, Tensor scalars, int64_t weighting, int64_t divergence,
                           int64_t ignore_index) {
  const e3::EntropyKl problem = entropy_kl_problem(student, teacher, labels, token_mask, scalars_of(scalars, true),
                                                   weighting, divergence, ignore_index, 0, std::nullopt);
  const Tensor incoming = torch::stable::contiguous(grad_loss), grad = new_grad(student);
  kernels().entropy_kl_backward(problem, torch_pool(),
                                vector_of<float>(incoming, ScalarType::Float, student.size(0), "grad_loss"),
                                streams(grad), grad.mutable_data_ptr());
  return grad;
}

std::string native_isa() { return e3::kIsaNames[static_cast<int>(kernels().isa)]; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(e3, m) { m.def("native_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(e3, CompositeExplicitAutograd, m) { m.impl("native_isa", TORCH_BOX(&native_isa)); }

STABLE_TORCH_LIBRARY_IMPL(e3, CPU, m) {
  m.impl("entropy_kl.native", TORCH_BOX(&entropy_kl));
  m.impl("entropy_kl_backward.native", TORCH_BOX(&entropy_kl_backward));
}
