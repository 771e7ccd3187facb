// From tensors to the plain values that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "kernels/ops_table.h"

namespace e3::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const OpsTable& kernels() {
  static const OpsTable& table = choose_table();
  return table;
}

inline std::string native_isa() { return kIsaNames[static_cast<int>(kernels().isa)]; }

inline Parallel torch_pool() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

// The tensor without gaps; without the dispatcher's cost where nothing is to do.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor) { return tensor.has_value() ? dense(*tensor) : tensor; }

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the native backend");
  }
}

inline Rows rows_of(const Tensor& tensor, const char* name) {
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

inline const double* doubles_of(const Tensor& scalars, int64_t count) {
  STD_TORCH_CHECK(scalars.scalar_type() == ScalarType::Double && scalars.numel() == count && scalars.is_contiguous(),
                  "scalars must be ", count, " contiguous float64 values");
  return static_cast<const double*>(scalars.const_data_ptr());
}

}  // namespace e3::ops
