// out[m][r] = Σ_k weight[r][k]·x[m][k] + bias[r] for a range of rows and a few vectors m: a GEMV for one vector, a
// small GEMM for more. Every weight is read once from memory whatever the number of vectors, and the order of every sum
// is the same for any number of vectors and threads: a row verified in a batch has the bits of the row computed alone.
#pragma once

#include "simd/simd.h"

namespace e3::E3_ISA_NAMESPACE {

inline constexpr int kStreams = 4;
inline constexpr int kVectorBlock = kLanes == 16 ? 4 : 2;
inline constexpr int kAheadBytes = 4096;

struct Vectors {
  const float* data;
  int64_t stride;
  int count;
};

// R rows by M vectors, one accumulator each. Rows lie `row_step` apart, and what follows each of them is fetched
// meanwhile: R distant streams keep more of the memory busy than R neighbouring rows.
template <int R, int M, class T>
inline void dot_block(const T* weight, int64_t row_step, const float* x, int64_t x_stride, int64_t n,
                      float (&out)[R][M]) {
  Vf total[R][M] = {};
  int64_t k = 0;
  constexpr int64_t line = kLineBytes / sizeof(T), ahead = kAheadBytes / sizeof(T);
  constexpr int64_t step = line > kLanes ? line : kLanes;
  for (; k + step <= n; k += step) {
    for (int r = 0; r < R; ++r)
      for (int64_t part = 0; part < step; part += line) __builtin_prefetch(weight + r * row_step + k + part + ahead);
    for (int64_t part = 0; part < step; part += kLanes)
      for (int r = 0; r < R; ++r) {
        const Vf w = load(weight + r * row_step + k + part);
        for (int m = 0; m < M; ++m) total[r][m] = fma(w, load(x + m * x_stride + k + part), total[r][m]);
      }
  }
  for (; k + kLanes <= n; k += kLanes)
    for (int r = 0; r < R; ++r) {
      const Vf w = load(weight + r * row_step + k);
      for (int m = 0; m < M; ++m) total[r][m] = fma(w, load(x + m * x_stride + k), total[r][m]);
    }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      out[r][m] = horizontal_sum(total[r][m]);
      for (int64_t rest = k; rest < n; ++rest)
        out[r][m] += load_one(weight + r * row_step + rest) * x[m * x_stride + rest];
    }
}

// Rows first, first + step, ... of the matrix by vectors [m, m + M).
template <int R, int M, class T>
inline void dot_rows(const T* weight, int64_t row_stride, int64_t first, int64_t step, const Vectors& x, int m,
                     int64_t n, const T* bias, float* out, int64_t out_stride) {
  float dots[R][M];
  dot_block<R, M>(weight + first * row_stride, step * row_stride, x.data + m * x.stride, x.stride, n, dots);
  for (int r = 0; r < R; ++r) {
    const int64_t row = first + r * step;
    const float offset = bias ? load_one(bias + row) : 0.0f;
    for (int j = 0; j < M; ++j) out[(m + j) * out_stride + row] = dots[r][j] + offset;
  }
}

template <int R, class T>
inline void dot_vectors(const T* weight, int64_t row_stride, int64_t first, int64_t step, const Vectors& x, int64_t n,
                        const T* bias, float* out, int64_t out_stride) {
  int m = 0;
  for (; m + kVectorBlock <= x.count; m += kVectorBlock)
    dot_rows<R, kVectorBlock>(weight, row_stride, first, step, x, m, n, bias, out, out_stride);
  for (; m < x.count; ++m) dot_rows<R, 1>(weight, row_stride, first, step, x, m, n, bias, out, out_stride);
}

// Rows [begin, end) of the matrix; `out` points at row 0's place in vector 0.
template <class T>
void gemv(const T* weight, int64_t row_stride, const T* bias, int64_t begin, int64_t end, int64_t n, const Vectors& x,
          float* out, int64_t out_stride) {
  const int64_t stream = (end - begin) / kStreams;
  for (int64_t row = begin; row < begin + stream; ++row)
    dot_vectors<kStreams>(weight, row_stride, row, stream, x, n, bias, out, out_stride);
  for (int64_t row = begin + kStreams * stream; row < end; ++row)
    dot_vectors<1>(weight, row_stride, row, 0, x, n, bias, out, out_stride);
}

// out += Σ_r x[r]·rows[r] for R rows that lie `stride` apart.
template <int R, class T>
inline void add_rows(float* out, const float* x, const T* rows, int64_t stride, int64_t count) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    Vf total = load(out + c);
    for (int r = 0; r < R; ++r) total = fma(broadcast(x[r]), load(rows + r * stride + c), total);
    store(out + c, total);
  }
  for (; c < count; ++c)
    for (int r = 0; r < R; ++r) out[c] += x[r] * load_one(rows + r * stride + c);
}

// out[m][c] = Σ_k weight[k][c]·x[m][k] + bias[c] for the columns [begin, end) of a matrix that is stored by its inputs
// k < n. The order of a column's sum is the same for any number of vectors and any range that begins at a vector.
template <class T>
void gemv_by_input(const T* weight, int64_t stride, const T* bias, int64_t begin, int64_t end, int64_t n,
                   const Vectors& x, float* out, int64_t out_stride) {
  for (int m = 0; m < x.count; ++m)
    for (int64_t c = begin; c < end; ++c) out[m * out_stride + c] = bias ? load_one(bias + c) : 0.0f;
  int64_t k = 0;
  for (; k + kStreams <= n; k += kStreams)
    for (int m = 0; m < x.count; ++m)
      add_rows<kStreams>(out + m * out_stride + begin, x.data + m * x.stride + k, weight + k * stride + begin, stride,
                         end - begin);
  for (; k < n; ++k)
    for (int m = 0; m < x.count; ++m)
      add_rows<1>(out + m * out_stride + begin, x.data + m * x.stride + k, weight + k * stride + begin, stride,
                  end - begin);
}

}  // namespace e3::E3_ISA_NAMESPACE
