// Marks a function that the CPU kernels and the CUDA half share. Internal linkage: the objects of two instruction sets
// must not be merged, or the wider one's code would run on a machine that lacks it.
#pragma once

#if defined(__CUDACC__)
#define E3_SHARED __host__ __device__ static inline
#else
#define E3_SHARED static inline
#endif
