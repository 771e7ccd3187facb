// gumbel_topk and its gradient.
#pragma once

#include <tuple>

#include "torch/ops/memory.h"

namespace e3::ops {

inline GumbelTopk gumbel_topk_problem(const Tensor& logits, const Tensor& scalars, int64_t k, int64_t seed,
                                      int64_t step, int64_t relaxation) {
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
          static_cast<Relaxation>(relaxation)};
}

inline std::tuple<Tensor, Tensor> gumbel_topk(Tensor logits, Tensor scalars, int64_t k, int64_t seed, int64_t step,
                                              int64_t relaxation) {
  const GumbelTopk problem = gumbel_topk_problem(logits, scalars, k, seed, step, relaxation);
  const Tensor mask = new_like(logits), probs = new_like(logits);
  kernels().gumbel_topk(problem, torch_pool(), mask.mutable_data_ptr(), probs.mutable_data_ptr());
  return {mask, probs};
}

inline Tensor gumbel_topk_backward(Tensor grad, Tensor logits, Tensor probs, Tensor scalars, int64_t k, int64_t seed,
                                   int64_t step, int64_t relaxation) {
  const GumbelTopk problem = gumbel_topk_problem(logits, scalars, k, seed, step, relaxation);
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

}  // namespace e3::ops
