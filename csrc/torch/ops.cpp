// torch.ops.e3.*: kernels on torch's stable ABI. Python defines every operator (e3kernels/ops, e3kernels/native.py),
// its schema, fake and autograd formula; here stand kernels alone, whose arguments nothing checks against the schemas.

#include <torch/csrc/stable/library.h>

#include "torch/ops/entropy_kl.h"
#include "torch/ops/gated_residual.h"
#include "torch/ops/gumbel_topk.h"
#include "torch/ops/linear.h"
#include "torch/ops/memory.h"
#include "torch/ops/topk_kl.h"

using e3::ops::Target;

STABLE_TORCH_LIBRARY_IMPL(e3, CompositeExplicitAutograd, m) {
  m.impl("native_isa", TORCH_BOX(&e3::ops::native_isa));
  m.impl("release_memory", TORCH_BOX(&e3::ops::release_memory));
}

STABLE_TORCH_LIBRARY_IMPL(e3, CPU, m) {
  m.impl("entropy_kl.native", TORCH_BOX(&e3::ops::entropy_kl<Target::fresh>));
  m.impl("entropy_kl_backward.native", TORCH_BOX(&e3::ops::entropy_kl_backward<Target::fresh>));
  m.impl("entropy_kl_tile", TORCH_BOX(&e3::ops::entropy_kl<Target::in_place>));
  m.impl("entropy_kl_tile_backward", TORCH_BOX(&e3::ops::entropy_kl_backward<Target::in_place>));
  m.impl("topk_kl.native", TORCH_BOX(&e3::ops::topk_kl<Target::fresh>));
  m.impl("topk_kl_backward.native", TORCH_BOX(&e3::ops::topk_kl_backward<Target::fresh>));
  m.impl("topk_kl_tile", TORCH_BOX(&e3::ops::topk_kl<Target::in_place>));
  m.impl("topk_kl_tile_backward", TORCH_BOX(&e3::ops::topk_kl_backward<Target::in_place>));
  m.impl("linear_logits", TORCH_BOX(&e3::ops::linear_logits));
  m.impl("linear_grad_hidden", TORCH_BOX(&e3::ops::linear_grad_hidden));
  m.impl("gumbel_topk.native", TORCH_BOX(&e3::ops::gumbel_topk));
  m.impl("gumbel_topk_backward.native", TORCH_BOX(&e3::ops::gumbel_topk_backward));
  m.impl("gated_residual.native", TORCH_BOX(&e3::ops::gated_residual));
  m.impl("gated_residual_backward.native", TORCH_BOX(&e3::ops::gated_residual_backward));
}
