#include "kernels/ops_table.h"

#include "kernels/entropy_kl.h"
#include "kernels/gated_residual.h"
#include "kernels/gumbel_topk.h"
#include "kernels/linear.h"
#include "kernels/topk_kl.h"

namespace e3::E3_ISA_NAMESPACE {

const OpsTable table{
    .isa = Isa::E3_ISA_NAMESPACE,
    .entropy_kl = entropy_kl,
    .entropy_kl_backward = entropy_kl_backward,
    .topk_kl = topk_kl,
    .topk_kl_backward = topk_kl_backward,
    .gumbel_topk = gumbel_topk,
    .gumbel_topk_backward = gumbel_topk_backward,
    .gated_residual = gated_residual,
    .gated_residual_backward = gated_residual_backward,
    .has_linear = has_linear,
    .linear_logits = linear_logits,
    .linear_grad_hidden = linear_grad_hidden,
};

}  // namespace e3::E3_ISA_NAMESPACE
