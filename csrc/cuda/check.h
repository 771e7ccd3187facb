#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace e3::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace e3::cuda
