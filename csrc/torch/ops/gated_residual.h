// gated_residual and its gradient.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "torch/ops/memory.h"

namespace e3::ops {

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

  GatedResidual problem() const {
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

inline Tensor gated_residual(Tensor hidden, Tensor branch_out, Tensor gate) {
  const Tensor out = new_like(hidden);
  if (out.numel() == 0) return out;
  const GatedTensors tensors(hidden, branch_out, gate);
  kernels().gated_residual(tensors.problem(), torch_pool(), streams(out), out.mutable_data_ptr());
  return out;
}

// The gate's gradient, one value an element of hidden, summed to the gate's shape.
inline Tensor summed_to(const Tensor& wide, const Tensor& hidden, const Tensor& gate) {
  std::vector<int64_t> dims;
  const int64_t missing = hidden.dim() - gate.dim();
  for (int64_t dim = 0; dim < hidden.dim(); ++dim) {
    if (dim < missing || gate.size(dim - missing) != hidden.size(dim)) dims.push_back(dim);
  }
  return dims.empty() ? wide : torch::stable::sum(wide, dims, true);
}

inline std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(Tensor grad, Tensor hidden, Tensor branch_out,
                                                                  Tensor gate) {
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

}  // namespace e3::ops
