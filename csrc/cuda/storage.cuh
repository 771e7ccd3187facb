// The storage types of weights and caches on the device, their conversion to and from fp32, and sums over threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace e3::cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

__device__ inline void store(float* target, float value) { *target = value; }
__device__ inline void store(__nv_bfloat16* target, float value) { *target = __float2bfloat16(value); }
__device__ inline void store(__half* target, float value) { *target = __float2half(value); }

// Sixteen bytes of T, the widest load of a thread.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

template <class T>
__device__ inline Pack<T> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T>*>(address);
}

// Sum over aligned groups of `kLanes` lanes; every lane gets its group's.
template <int kLanes = 32>
__device__ inline float lane_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over a block of whole warps, up to 1024 threads; every thread gets it.
__device__ inline float block_sum(float value) {
  __shared__ float parts[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = lane_sum(value);
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  value = lane_sum(lane < int(blockDim.x / 32) ? parts[lane] : 0.0f);
  __syncthreads();
  return value;
}

}  // namespace e3::cuda
