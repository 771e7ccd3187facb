// The products of the linear losses for which this instruction set has a kernel: fp32 from AVX-512 on, bf16 with
// AVX-512 BF16 or AMX.
#pragma once

#include "kernels/linear_amx.h"
#include "kernels/linear_fma.h"

namespace e3::E3_ISA_NAMESPACE {

inline bool has_linear([[maybe_unused]] DType dtype) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) return true;
#endif
#if defined(__AVX512F__)
  if (dtype == DType::float32) return true;
#endif
  return false;
}

// `problem` has a dtype for which has_linear.
inline void linear_logits([[maybe_unused]] const LinearLogits& problem, [[maybe_unused]] const Parallel& pool) {
#if defined(__AMX_BF16__)
  if (problem.weight.dtype == DType::bfloat16) return linear_logits_amx(problem, pool);
#elif defined(__AVX512BF16__)
  if (problem.weight.dtype == DType::bfloat16) return linear_logits_fma<bf16>(problem, pool);
#endif
#if defined(__AVX512F__)
  linear_logits_fma<float>(problem, pool);
#endif
}

inline void linear_grad_hidden([[maybe_unused]] const LinearGradHidden& problem,
                               [[maybe_unused]] const Parallel& pool) {
#if defined(__AMX_BF16__)
  if (problem.weight.dtype == DType::bfloat16) return linear_grad_hidden_amx(problem, pool);
#elif defined(__AVX512BF16__)
  if (problem.weight.dtype == DType::bfloat16) return linear_grad_hidden_fma<bf16>(problem, pool);
#endif
#if defined(__AVX512F__)
  linear_grad_hidden_fma<float>(problem, pool);
#endif
}

}  // namespace e3::E3_ISA_NAMESPACE
