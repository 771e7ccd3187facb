// Marks a function that the CPU kernels and the CUDA half share.
#pragma once

#if defined(__CUDACC__)
#define E3_HOST_DEVICE __host__ __device__
#else
#define E3_HOST_DEVICE
#endif
