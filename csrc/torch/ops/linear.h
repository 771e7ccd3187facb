// The products of the linear losses.
#pragma once

#include "torch/ops/boundary.h"

namespace e3::ops {

// The rows that a product of the linear losses reads, of the dtype of its `out`, a contiguous (rows, columns).
inline Rows operand_of(const Tensor& operand, const char* name, const Tensor& out, int64_t rows, int64_t columns) {
  const DType dtype = dtype_of(out, "out");
  STD_TORCH_CHECK(kernels().has_linear(dtype), "out has a dtype without a kernel on ", native_isa(),
                  ": float32 needs AVX-512, bfloat16 AVX-512 BF16");
  STD_TORCH_CHECK(out.is_contiguous() && out.size(0) == rows && out.size(1) == columns, "out must be contiguous (",
                  rows, ", ", columns, ")");
  const Rows operand_rows = rows_of(operand, name);
  STD_TORCH_CHECK(operand_rows.dtype == dtype, name, " must have the dtype of out");
  return operand_rows;
}

// hidden·weightᵀ + bias to `out`.
inline void linear_logits(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor out) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == width, "weight must be (vocabulary, ", width, ")");
  bias = dense(bias);
  kernels().linear_logits({rows, width, vocabulary, operand_of(hidden, "hidden", out, rows, vocabulary),
                           operand_of(weight, "weight", out, rows, vocabulary),
                           vector_of<void>(bias, out.scalar_type(), vocabulary, "bias"), out.mutable_data_ptr()},
                          torch_pool());
}

// grad·weight to `out`.
inline void linear_grad_hidden(Tensor grad, Tensor weight, Tensor out) {
  const int64_t rows = grad.size(0), vocabulary = grad.size(1), width = weight.size(1);
  STD_TORCH_CHECK(weight.size(0) == vocabulary, "weight must be (", vocabulary, ", width)");
  kernels().linear_grad_hidden({rows, width, vocabulary, operand_of(grad, "grad", out, rows, width),
                                operand_of(weight, "weight", out, rows, width), out.mutable_data_ptr()},
                               torch_pool());
}

}  // namespace e3::ops
