// The storage types of weights and caches on the device, and their conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

__device__ inline float warp_sum(float value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over a block of up to 1024 threads; every thread gets it.
__device__ inline float block_sum(float value) {
  __shared__ float parts[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  value = warp_sum(lane < int(blockDim.x + 31) / 32 ? parts[lane] : 0.0f);
  __syncthreads();
  return value;
}

}  // namespace e3::cuda
