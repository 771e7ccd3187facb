// torch.ops.e3.*: kernels on torch's stable ABI. Python defines every operator (e3kernels/ops, e3kernels/native.py),
// its schema, fake and autograd formula; here stand kernels alone, whose arguments nothing checks against the schemas.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include "torch/buffer_cache.h"
#endif
#include "kernels/ops_table.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A result larger than this, twice a core's second-level cache, is written past the caches: lines that are written
// whole need not be read first, and do not push out the row that is in use.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// The memory of a result larger than this is kept for the next one: below it malloc keeps its own.
constexpr int64_t kKeptBytes = int64_t{4} << 20;

const e3::OpsTable& kernels() {
  static const e3::OpsTable& table = e3::choose_table();
  return table;
}

e3::Parallel torch_pool() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

// The tensor without gaps; without the dispatcher's cost where nothing is to do.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

OptionalTensor dense(const OptionalTensor& tensor) { return tensor.has_value() ? dense(*tensor) : tensor; }

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

// Of a tensor without gaps, which the caller keeps.
template <class T>
const T* vector_of(const OptionalTensor& tensor, ScalarType dtype, int64_t length, const char* name) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(
      tensor->scalar_type() == dtype && tensor->dim() == 1 && tensor->size(0) == length && tensor->is_contiguous(),
      name, " must be a vector of ", length, " values of the dtype in docs/dispatcher.md");
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
  return {
      static_cast<e3::Weighting>(weighting), s.gamma, s.kd_ratio, s.temperature, static_cast<e3::Reduction>(reduction),
      items.has_value() ? &*items : nullptr};
}

std::optional<double> number_of(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  STD_TORCH_CHECK(tensor->numel() == 1 && tensor->is_cpu(), "num_items must be one number on the CPU");
  const Tensor number = torch::stable::to(*tensor, ScalarType::Double);
  return *static_cast<const double*>(number.const_data_ptr());
}

int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

bool streams(const Tensor& tensor) { return bytes_of(tensor) >= kStreamBytes; }

// Uninitialised, contiguous; the C shim itself, as the dispatcher would cost more than a small kernel.
Tensor new_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, const std::vector<int64_t>& strides,
                 ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

#if defined(__linux__)
// Never destroyed: a result may outlive every static object.
e3::BufferCache& buffers() {
  static e3::BufferCache& cache = *new e3::BufferCache;
  return cache;
}
#endif

void release_memory() {
#if defined(__linux__)
  buffers().clear();
#endif
}

// Uninitialised, contiguous, of the shape and dtype of `like`.
Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
#if defined(__linux__)
  if (bytes_of(like) >= kKeptBytes) {
    const e3::BufferCache::Buffer buffer = buffers().take(bytes_of(like));
    if (buffer.data != nullptr) {
      return torch::stable::from_blob(buffer.data, sizes, strides, like.device(), like.scalar_type(),
                                      [buffer](void*) { buffers().give(buffer); });
    }
  }
#endif
  return new_empty(sizes, strides, like.scalar_type());
}

// Whether the gradient of the student's logits is a tensor of its own, or replaces them.
enum class Target { fresh, in_place };

struct Loss {
  Tensor loss, stats, grad;
  bool stream;
  e3::LossOutput output() const {
    void* target = grad.numel() == 0 ? nullptr : grad.mutable_data_ptr();
    return {static_cast<float*>(loss.mutable_data_ptr()), static_cast<float*>(stats.mutable_data_ptr()), target,
            stream};
  }
  std::tuple<Tensor, Tensor, Tensor> tuple() const { return {loss, stats, grad}; }
};

Tensor gradient_of(const Tensor& student, Target target) {
  STD_TORCH_CHECK(target == Target::fresh || student.is_contiguous(), "student must be contiguous to be replaced");
  return target == Target::fresh ? new_like(student) : student;
}

Loss new_loss(const Tensor& student, int64_t reduction, bool need_student, Target target) {
  const int64_t rows = student.size(0);
  const bool per_token = reduction == static_cast<int64_t>(e3::Reduction::none);
  const int64_t loss_shape[] = {rows}, stats_shape[] = {4, rows}, none[] = {0};
  return {new_empty({loss_shape, size_t{per_token}}, {1}, ScalarType::Float),
          new_empty({stats_shape, 2}, {rows, 1}, ScalarType::Float),
          need_student && !per_token ? gradient_of(student, target) : new_empty({none, 1}, {1}, student.scalar_type()),
          target == Target::fresh && streams(student)};
}

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

template <Target kTarget>
std::tuple<Tensor, Tensor, Tensor> entropy_kl(Tensor student, Tensor teacher, OptionalTensor labels,
                                              OptionalTensor token_mask, Tensor scalars, int64_t weighting,
                                              int64_t divergence, int64_t ignore_index, int64_t reduction,
                                              OptionalTensor num_items, bool need_student) {
  const std::optional<double> items = number_of(num_items);
  labels = dense(labels), token_mask = dense(token_mask);
  const e3::EntropyKl problem = entropy_kl_problem(student, teacher, labels, token_mask, scalars_of(scalars, true),
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
  const e3::EntropyKl problem = entropy_kl_problem(student, teacher, labels, token_mask, scalars_of(scalars, true),
                                                   weighting, divergence, ignore_index, 0, std::nullopt);
  const Tensor incoming = dense(grad_loss), grad = gradient_of(student, kTarget);
  kernels().entropy_kl_backward(problem, torch_pool(),
                                vector_of<float>(incoming, ScalarType::Float, student.size(0), "grad_loss"),
                                kTarget == Target::fresh && streams(grad), grad.mutable_data_ptr());
  return grad;
}

// Of stored predictions and tokens without gaps, which the caller keeps.
e3::TopkKl topk_kl_problem(const Tensor& student, const Tensor& logprobs, const Tensor& ids,
                           const OptionalTensor& labels, const OptionalTensor& mask, const Scalars& scalars,
                           int64_t weighting, int64_t divergence, int64_t ignore_index, int64_t tail, int64_t reduction,
                           const std::optional<double>& items) {
  const e3::Rows student_rows = rows_of(student, "student");
  const int64_t count = student.size(0), vocabulary = student.size(1);
  for (const Tensor* stored : {&logprobs, &ids}) {
    STD_TORCH_CHECK(stored->dim() == 2 && stored->size(0) == count && stored->size(1) > 0,
                    "teacher_logprobs and teacher_ids must be (", count, ", k)");
  }
  STD_TORCH_CHECK(logprobs.size(1) == ids.size(1), "teacher_ids must have the shape of teacher_logprobs");
  STD_TORCH_CHECK(logprobs.scalar_type() == ScalarType::Float, "teacher_logprobs must be float32");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "teacher_ids must be int64");
  const e3::TopkKl problem{vocabulary,
                           ids.size(1),
                           tokens_of(labels, mask, count, vocabulary, ignore_index),
                           student_rows,
                           static_cast<const float*>(logprobs.const_data_ptr()),
                           static_cast<const int64_t*>(ids.const_data_ptr()),
                           scalars.student(),
                           static_cast<e3::Tail>(tail),
                           static_cast<e3::Divergence>(divergence),
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
  const e3::TopkKl problem =
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
  const e3::TopkKl problem =
      topk_kl_problem(student, teacher_logprobs, teacher_ids, labels, token_mask, scalars_of(scalars, false), weighting,
                      divergence, ignore_index, tail, 0, std::nullopt);
  const Tensor incoming = dense(grad_loss), grad = gradient_of(student, kTarget);
  kernels().topk_kl_backward(problem, torch_pool(),
                             vector_of<float>(incoming, ScalarType::Float, student.size(0), "grad_loss"),
                             kTarget == Target::fresh && streams(grad), grad.mutable_data_ptr());
  return grad;
}

e3::GumbelTopk gumbel_topk_problem(const Tensor& logits, const Tensor& scalars, int64_t k, int64_t seed, int64_t step,
                                   int64_t relaxation) {
  const int64_t dims = logits.dim();
  STD_TORCH_CHECK(dims == 1 || dims == 2, "logits must have 1 or 2 dimensions, has ", dims);
  const int64_t length = logits.size(dims - 1), rows = dims == 2 ? logits.size(0) : 1;
  STD_TORCH_CHECK(length > 0 && k >= 0 && k <= length, "k must lie in [0, ", length, "], is ", k);
  STD_TORCH_CHECK(rows < int64_t{1} << 32, "logits must have fewer than 2^32 rows");
  const double* options = doubles_of(scalars, 2);
  return {{dtype_of(logits, "logits"), logits.const_data_ptr(), dims == 2 ? logits.stride(0) : 0},
          logits.stride(dims - 1),
          rows,
          length,
          k,
          options[0],
          options[1],
          static_cast<uint64_t>(seed),
          static_cast<uint64_t>(step),
          static_cast<e3::Relaxation>(relaxation)};
}

std::tuple<Tensor, Tensor> gumbel_topk(Tensor logits, Tensor scalars, int64_t k, int64_t seed, int64_t step,
                                       int64_t relaxation) {
  const e3::GumbelTopk problem = gumbel_topk_problem(logits, scalars, k, seed, step, relaxation);
  const Tensor mask = new_like(logits), probs = new_like(logits);
  kernels().gumbel_topk(problem, torch_pool(), mask.mutable_data_ptr(), probs.mutable_data_ptr());
  return {mask, probs};
}

Tensor gumbel_topk_backward(Tensor grad, Tensor logits, Tensor probs, Tensor scalars, int64_t k, int64_t seed,
                            int64_t step, int64_t relaxation) {
  const e3::GumbelTopk problem = gumbel_topk_problem(logits, scalars, k, seed, step, relaxation);
  if (k == 0 || k == problem.length) return torch::stable::new_zeros(logits, logits.sizes());
  for (const Tensor* tensor : {&grad, &probs}) {
    STD_TORCH_CHECK(tensor->scalar_type() == logits.scalar_type() && tensor->numel() == logits.numel(),
                    "grad and probs must have the dtype and shape of logits");
  }
  const Tensor incoming = dense(grad), relaxed = dense(probs);
  const Tensor result = new_like(logits);
  kernels().gumbel_topk_backward(problem, {incoming.const_data_ptr(), relaxed.const_data_ptr()}, torch_pool(),
                                 result.mutable_data_ptr());
  return result;
}

// hidden and branch_out without gaps, and the gate as one value a row of (rows, columns) or one an element.
struct GatedTensors {
  Tensor hidden, branch, gate;
  int64_t rows;
  bool by_element;

  GatedTensors(const Tensor& h, const Tensor& f, const Tensor& m)
      : hidden(dense(h)), branch(dense(f)), gate(m), rows(1) {
    STD_TORCH_CHECK(f.scalar_type() == h.scalar_type() && f.numel() == h.numel(),
                    "branch_out must have the dtype and shape of hidden");
    const int64_t missing = h.dim() - m.dim();
    STD_TORCH_CHECK(missing >= 0, "gate must broadcast to hidden");
    // One value a row: the gate has hidden's first dimensions, and 1 in all after them.
    int64_t leading = 0;
    while (leading >= missing && leading < h.dim() && m.size(leading - missing) == h.size(leading)) {
      rows *= h.size(leading++);
    }
    by_element = m.numel() != 1 && m.numel() != rows;
    if (m.numel() == 1) rows = 1;
    if (by_element) {
      rows = 1;
      gate = expand(m, h.sizes());
    }
    if (gate.scalar_type() == ScalarType::Double) gate = torch::stable::to(gate, ScalarType::Float);
    gate = dense(gate);
  }

  e3::GatedResidual problem() const {
    const int64_t columns = hidden.numel() / rows;
    return {dtype_of(hidden, "hidden"),
            rows,
            columns,
            hidden.const_data_ptr(),
            branch.const_data_ptr(),
            gate.const_data_ptr(),
            dtype_of(gate, "gate"),
            by_element};
  }

  static Tensor expand(const Tensor& tensor, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(sizes),
                                      torch::stable::detail::from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
};

Tensor gated_residual(Tensor hidden, Tensor branch_out, Tensor gate) {
  const Tensor out = new_like(hidden);
  if (out.numel() == 0) return out;
  const GatedTensors tensors(hidden, branch_out, gate);
  kernels().gated_residual(tensors.problem(), torch_pool(), streams(out), out.mutable_data_ptr());
  return out;
}

// The gate's gradient, one value an element of hidden, summed to the gate's shape.
Tensor summed_to(const Tensor& wide, const Tensor& hidden, const Tensor& gate) {
  std::vector<int64_t> dims;
  const int64_t missing = hidden.dim() - gate.dim();
  for (int64_t dim = 0; dim < hidden.dim(); ++dim) {
    if (dim < missing || gate.size(dim - missing) != hidden.size(dim)) dims.push_back(dim);
  }
  return dims.empty() ? wide : torch::stable::sum(wide, dims, true);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(Tensor grad, Tensor hidden, Tensor branch_out, Tensor gate) {
  const Tensor grad_hidden = new_like(hidden), grad_branch = new_like(branch_out);
  if (hidden.numel() == 0) return {grad_hidden, grad_branch, torch::stable::new_zeros(gate, gate.sizes())};
  const GatedTensors tensors(hidden, branch_out, gate);
  STD_TORCH_CHECK(grad.scalar_type() == hidden.scalar_type() && grad.numel() == hidden.numel(),
                  "grad must have the dtype and shape of hidden");
  const Tensor incoming = dense(grad);
  const Tensor sums =
      torch::stable::new_empty(gate, tensors.by_element ? hidden.sizes() : gate.sizes(), ScalarType::Float);
  kernels().gated_residual_backward(tensors.problem(), incoming.const_data_ptr(), torch_pool(), streams(grad_hidden),
                                    grad_hidden.mutable_data_ptr(), grad_branch.mutable_data_ptr(),
                                    static_cast<float*>(sums.mutable_data_ptr()));
  const Tensor folded = tensors.by_element ? summed_to(sums, hidden, gate) : sums;
  return {grad_hidden, grad_branch,
          torch::stable::to(torch::stable::reshape(folded, gate.sizes()), gate.scalar_type())};
}

std::string native_isa() { return e3::kIsaNames[static_cast<int>(kernels().isa)]; }

// The rows that a product of the linear losses reads, of the dtype of its `out`, a contiguous (rows, columns).
e3::Rows operand_of(const Tensor& operand, const char* name, const Tensor& out, int64_t rows, int64_t columns) {
  const e3::DType dtype = dtype_of(out, "out");
  STD_TORCH_CHECK(kernels().has_linear(dtype), "out has a dtype without a kernel on ", native_isa(),
                  ": float32 needs AVX-512, bfloat16 AVX-512 BF16");
  STD_TORCH_CHECK(out.is_contiguous() && out.size(0) == rows && out.size(1) == columns, "out must be contiguous (",
                  rows, ", ", columns, ")");
  const e3::Rows operand_rows = rows_of(operand, name);
  STD_TORCH_CHECK(operand_rows.dtype == dtype, name, " must have the dtype of out");
  return operand_rows;
}

// hidden·weightᵀ + bias to `out`.
void linear_logits(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor out) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == width, "weight must be (vocabulary, ", width, ")");
  bias = dense(bias);
  kernels().linear_logits({rows, width, vocabulary, operand_of(hidden, "hidden", out, rows, vocabulary),
                           operand_of(weight, "weight", out, rows, vocabulary),
                           vector_of<void>(bias, out.scalar_type(), vocabulary, "bias"), out.mutable_data_ptr()},
                          torch_pool());
}

// grad·weight to `out`.
void linear_grad_hidden(Tensor grad, Tensor weight, Tensor out) {
  const int64_t rows = grad.size(0), vocabulary = grad.size(1), width = weight.size(1);
  STD_TORCH_CHECK(weight.size(0) == vocabulary, "weight must be (", vocabulary, ", width)");
  kernels().linear_grad_hidden({rows, width, vocabulary, operand_of(grad, "grad", out, rows, width),
                                operand_of(weight, "weight", out, rows, width), out.mutable_data_ptr()},
                               torch_pool());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(e3, CompositeExplicitAutograd, m) {
  m.impl("native_isa", TORCH_BOX(&native_isa));
  m.impl("release_memory", TORCH_BOX(&release_memory));
}

STABLE_TORCH_LIBRARY_IMPL(e3, CPU, m) {
  m.impl("entropy_kl.native", TORCH_BOX(&entropy_kl<Target::fresh>));
  m.impl("entropy_kl_backward.native", TORCH_BOX(&entropy_kl_backward<Target::fresh>));
  m.impl("entropy_kl_tile", TORCH_BOX(&entropy_kl<Target::in_place>));
  m.impl("entropy_kl_tile_backward", TORCH_BOX(&entropy_kl_backward<Target::in_place>));
  m.impl("topk_kl.native", TORCH_BOX(&topk_kl<Target::fresh>));
  m.impl("topk_kl_backward.native", TORCH_BOX(&topk_kl_backward<Target::fresh>));
  m.impl("topk_kl_tile", TORCH_BOX(&topk_kl<Target::in_place>));
  m.impl("topk_kl_tile_backward", TORCH_BOX(&topk_kl_backward<Target::in_place>));
  m.impl("linear_logits", TORCH_BOX(&linear_logits));
  m.impl("linear_grad_hidden", TORCH_BOX(&linear_grad_hidden));
  m.impl("gumbel_topk.native", TORCH_BOX(&gumbel_topk));
  m.impl("gumbel_topk_backward.native", TORCH_BOX(&gumbel_topk_backward));
  m.impl("gated_residual.native", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward.native", TORCH_BOX(&gated_residual_backward));
}
