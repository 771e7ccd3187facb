// Where results are written.
#pragma once

#include <algorithm>
#include <vector>

#include "torch/ops/boundary.h"
#if defined(__linux__)
#include "torch/ops/buffer_cache.h"
#endif

namespace e3::ops {

// A result larger than this, twice a core's second-level cache, is written past the caches: lines that are written
// whole need not be read first, and do not push out the row that is in use.
inline constexpr int64_t kStreamBytes = int64_t{4} << 20;

// The memory of a result larger than this is kept for the next one: below it malloc keeps its own.
inline constexpr int64_t kKeptBytes = int64_t{4} << 20;

inline int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

inline bool streams(const Tensor& tensor) { return bytes_of(tensor) >= kStreamBytes; }

// Uninitialised, contiguous; the C shim itself, as the dispatcher would cost more than a small kernel.
inline Tensor new_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, const std::vector<int64_t>& strides,
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
inline BufferCache& buffers() {
  static BufferCache& cache = *new BufferCache;
  return cache;
}
#endif

inline void release_memory() {
#if defined(__linux__)
  buffers().clear();
#endif
}

// Uninitialised, contiguous, of the shape and dtype of `like`.
inline Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;) strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
#if defined(__linux__)
  if (bytes_of(like) >= kKeptBytes) {
    const BufferCache::Buffer buffer = buffers().take(bytes_of(like));
    if (buffer.data != nullptr) {
      return torch::stable::from_blob(buffer.data, sizes, strides, like.device(), like.scalar_type(),
                                      [buffer](void*) { buffers().give(buffer); });
    }
  }
#endif
  return new_empty(sizes, strides, like.scalar_type());
}

}  // namespace e3::ops
