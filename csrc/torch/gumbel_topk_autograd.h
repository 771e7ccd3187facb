// gumbel_topk.native with its gradient, for eager tensors: what e3kernels/ops/gumbel_topk.py registers in Python,
// without Python between autograd and the kernels, which take about as long as one call into it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <memory>
#include <tuple>

namespace e3 {

template <typename Signature>
c10::TypedOperatorHandle<Signature> native_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "native").template typed<Signature>();
}

struct GumbelDraw {
  at::Tensor scalars;  // τ and κ
  int64_t k, seed, step, relaxation;
};

inline std::tuple<at::Tensor, at::Tensor> gumbel_topk_kernel(const at::Tensor& logits, const GumbelDraw& draw) {
  static const auto kernel = native_operator<std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, c10::SymInt, int64_t)>("e3::gumbel_topk");
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel.call(logits, draw.scalars, draw.k, draw.seed, draw.step, draw.relaxation);
}

inline at::Tensor gumbel_topk_backward_kernel(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& probs,
                                              const GumbelDraw& draw) {
  static const auto kernel =
      native_operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                 c10::SymInt, c10::SymInt, c10::SymInt, int64_t)>("e3::gumbel_topk_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel.call(grad, logits, probs, draw.scalars, draw.k, draw.seed, draw.step, draw.relaxation);
}

// Its inputs: logits alone has a gradient. Straight-through: the mask's gradient is that of probs, so the two add.
struct GumbelTopkFunction : torch::autograd::Function<GumbelTopkFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& logits,
                                                const GumbelDraw& draw) {
    auto [mask, probs] = gumbel_topk_kernel(logits, draw);
    context->set_materialize_grads(false);
    context->save_for_backward({logits, probs, draw.scalars});
    context->saved_data["codes"] = std::vector<int64_t>{draw.k, draw.seed, draw.step, draw.relaxation};
    return {mask, probs};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list incoming) {
    const at::Tensor &of_mask = incoming[0], &of_probs = incoming[1];
    if (!of_mask.defined() && !of_probs.defined()) return {at::Tensor(), at::Tensor()};
    const at::Tensor total = !of_mask.defined() ? of_probs : !of_probs.defined() ? of_mask : of_mask + of_probs;
    const auto saved = context->get_saved_variables();
    const auto codes = context->saved_data["codes"].toIntVector();
    const GumbelDraw draw{saved[2], codes[0], codes[1], codes[2], codes[3]};
    const at::Tensor gradient = gumbel_topk_backward_kernel(total, saved[0], saved[1], draw);
    if (!at::GradMode::is_enabled()) return {gradient, at::Tensor()};
    // The gradient depends on the logits and on what came in: whoever differentiates it by either meets the refusal.
    const auto refusal = std::make_shared<torch::autograd::DelayedError>(
        "gumbel_topk is once_differentiable: its gradient has no gradient", 3);
    return {(*refusal)({gradient, total, saved[0]})[0], at::Tensor()};
  }
};

inline std::tuple<at::Tensor, at::Tensor> gumbel_topk(const at::Tensor& logits, const at::Tensor& scalars, int64_t k,
                                                      int64_t seed, int64_t step, int64_t relaxation) {
  const GumbelDraw draw{scalars, k, seed, step, relaxation};
  if (!logits.requires_grad() || !at::GradMode::is_enabled()) return gumbel_topk_kernel(logits, draw);
  const auto outputs = GumbelTopkFunction::apply(logits, draw);
  return {outputs[0], outputs[1]};
}

}  // namespace e3
