// Matrices of a storage dtype, as plain values.
#pragma once

#include <cstdint>

namespace e3 {

enum class DType : int { float32, bfloat16, float16 };

// A matrix whose rows are contiguous; `stride` counts elements from one row to the next.
struct Rows {
  DType dtype;
  const void* data;
  int64_t stride;
};

[[gnu::always_inline]] inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace e3
