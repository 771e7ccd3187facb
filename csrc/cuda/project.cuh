// Products of matrices with the vectors of a step. A warp takes kRows rows; every weight is read once, sixteen bytes a
// load, whatever the number of tokens, and a load of the vectors serves all rows of the warp.
#pragma once

#include "cuda/step_state.cuh"
#include "cuda/storage.cuh"
#include "decode/softmax.h"

namespace e3::cuda {

inline constexpr int kThreads = 256;

// More tokens share the registers with fewer loads in flight.
template <int kTokens>
inline constexpr int kRows = kTokens == 1 ? 2 : 4;

template <int kTokens>
__host__ __device__ inline unsigned blocks_of(int64_t rows) {
  constexpr int64_t rows_of_block = kThreads / 32 * kRows<kTokens>;
  return unsigned((rows + rows_of_block - 1) / rows_of_block);
}

// Which result of a warp that begins at row `first` a lane finishes.
template <int kTokens>
struct Place {
  int64_t row;
  int token;
  bool taken;

  __device__ Place(int64_t first, int64_t rows, int64_t tokens) {
    const int lane = threadIdx.x % 32;
    row = first + lane / kTokens;
    token = lane % kTokens;
    taken = lane < kRows<kTokens> * kTokens && row < rows && token < tokens;
  }
};

// W·x + b of this warp's rows and all tokens: a lane gets the result of its place.
template <int kTokens, class T>
class RowDots {
 public:
  __device__ RowDots(const MatrixView& matrix, int64_t first, Rows x) {
    const T* rows[kR];  // those beyond the last are the last again
    bool aligned = true;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int64_t row = first + r < matrix.rows ? first + r : matrix.rows - 1;
      rows[r] = static_cast<const T*>(matrix.weight) + row * matrix.stride;
      aligned = aligned && reinterpret_cast<uintptr_t>(rows[r]) % 16 == 0;
    }
    const int lane = threadIdx.x % 32;
    const int columns = int(matrix.columns), packed = aligned ? columns / kPack * kPack : 0;
#pragma unroll(kTokens == 1 ? 4 : 1)
    for (int k = lane * kPack; k < packed; k += 32 * kPack) add_packs(rows, k, x);
    for (int k = packed + lane; k < columns; k += 32)
      for (int m = 0; m < kTokens; ++m)
        for (int r = 0; r < kR; ++r) sums[r][m] += to_float(rows[r][k]) * x[m][k];
#pragma unroll
    for (int r = 0; r < kR; ++r)
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        const float sum = lane_sum(sums[r][m]);
        if (lane == r * kTokens + m) result = sum;
      }
    const int64_t row = first + lane / kTokens;
    if (matrix.bias && row < matrix.rows) result += to_float(static_cast<const T*>(matrix.bias)[row]);
  }

  float result = 0;

 private:
  static constexpr int kR = kRows<kTokens>, kPack = Pack<T>::kCount;

  __device__ void add_packs(const T* (&rows)[kR], int k, Rows x) {
    Pack<T> weights[kR];
#pragma unroll
    for (int r = 0; r < kR; ++r) weights[r] = load_pack(rows[r] + k);
#pragma unroll
    for (int m = 0; m < kTokens; ++m)
#pragma unroll
      for (int part = 0; part < kPack; part += 4) {
        const Pack<float> values = load_pack(x[m] + k + part);
#pragma unroll
        for (int r = 0; r < kR; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[r][m] += to_float(weights[r].values[part + j]) * values.values[j];
      }
  }

  float sums[kR][kTokens] = {};
};

template <int kTokens>
__device__ inline int64_t first_row(unsigned block) {
  return (int64_t(block) * (kThreads / 32) + threadIdx.x / 32) * kRows<kTokens>;
}

// Query, key and value at once: `out` holds them one after the other.
template <int kTokens, class T>
__global__ void __launch_bounds__(kThreads, 1)
    project_heads(const StepState* step, MatrixView query, MatrixView key, MatrixView value, Rows x, Rows out) {
  unsigned block = blockIdx.x;
  int64_t offset = 0;
  MatrixView matrix = query;
  if (block >= blocks_of<kTokens>(query.rows)) {
    block -= blocks_of<kTokens>(query.rows);
    const bool is_value = block >= blocks_of<kTokens>(key.rows);
    if (is_value) block -= blocks_of<kTokens>(key.rows);
    matrix = is_value ? value : key;
    offset = query.rows + (is_value ? key.rows : 0);
  }
  const int64_t first = first_row<kTokens>(block);
  if (first >= matrix.rows) return;
  const RowDots<kTokens, T> dots(matrix, first, x);
  const Place<kTokens> at(first, matrix.rows, step->count);
  if (at.taken) out[at.token][offset + at.row] = dots.result;
}

// out = W·x + b, or out += gate·scale·(W·x + b) with a gate in device memory.
template <int kTokens, class T>
__global__ void __launch_bounds__(kThreads, 1)
    project(const StepState* step, MatrixView matrix, const float* gate, float scale, Rows x, Rows out) {
  const int64_t first = first_row<kTokens>(blockIdx.x);
  if (first >= matrix.rows) return;
  const RowDots<kTokens, T> dots(matrix, first, x);
  const Place<kTokens> at(first, matrix.rows, step->count);
  if (!at.taken) return;
  float& target = out[at.token][at.row];
  target = gate ? target + *gate * scale * dots.result : dots.result;
}

template <int kTokens, class T>
__global__ void __launch_bounds__(kThreads, 1)
    project_logits(const StepState* step, MatrixView head, float scale, float softcap, Rows x) {
  const int64_t first = first_row<kTokens>(blockIdx.x);
  if (first >= head.rows) return;
  const RowDots<kTokens, T> dots(head, first, x);
  const Place<kTokens> at(first, head.rows, step->count);
  if (at.taken) step->logits[at.token * head.rows + at.row] = capped(dots.result * scale, softcap);
}

// activation(gate·x)·(up·x), the hidden values of a gated linear unit.
template <int kTokens, class T>
__global__ void __launch_bounds__(kThreads, 1)
    project_glu(const StepState* step, MatrixView gate, MatrixView up, Activation activation, Rows x, Rows out) {
  const auto exponential = [](float value) { return expf(value); };
  const int64_t first = first_row<kTokens>(blockIdx.x);
  if (first >= gate.rows) return;
  const RowDots<kTokens, T> gates(gate, first, x), ups(up, first, x);
  const Place<kTokens> at(first, gate.rows, step->count);
  if (!at.taken) return;
  const float z = gates.result;
  const float activated = activation == Activation::silu        ? silu(z, exponential)
                          : activation == Activation::gelu_tanh ? gelu_tanh(z, exponential)
                                                                : gelu(z);
  out[at.token][at.row] = activated * ups.result;
}

}  // namespace e3::cuda
