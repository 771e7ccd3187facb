// What one thread of a decoding step has and does in every block. Threads split the rows of every matrix and the
// context of the attention, and meet at a barrier between phases. Each keeps its own copy of the residual stream, so
// that norms and residual additions need no barrier. Activations and sums are fp32.
#pragma once

#include "decode/decode_attention.h"
#include "decode/gemv.h"
#include "decode/glu.h"
#include "decode/norm.h"
#include "decode/spin_barrier.h"
#include "decode/step/scratch.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
struct StepThread {
  StepThread(const StepView& view, SpinBarrier& meeting, int index, int count)
      : step(view),
        decoder(*view.decoder),
        scratch(view, count, view.scratch),
        barrier(meeting),
        thread(index),
        threads(count),
        x(scratch.residual(index)),
        h(scratch.input(index)) {}

  int64_t tokens() const { return step.token_count; }
  Share share(int64_t rows) const { return Share(rows, thread, threads, kStreams); }
  Share share(const MatrixView& matrix) const { return share(matrix.rows); }

  // norm(x) in h, or x itself for a block that normalises its output only (OLMo 2).
  Vectors block_input(const NormView& norm) const {
    if (!norm.size) return {x, decoder.hidden, step.token_count};
    for (int m = 0; m < tokens(); ++m) normalise<T>(h + m * decoder.hidden, x + m * decoder.hidden, norm);
    return {h, decoder.hidden, step.token_count};
  }

  // This thread's rows of the product.
  void project(const MatrixView& matrix, const Vectors& input, float* out, int64_t out_stride) const {
    const Share rows = share(matrix);
    gemv(weight_of(matrix), matrix.stride, static_cast<const T*>(matrix.bias), rows.begin, rows.end, matrix.columns,
         input, out, out_stride);
  }

  // out = act(gate)·up; `out` may be `gate`.
  void gated(float* out, const float* gate, const float* up, int64_t n) const {
    if (decoder.activation == Activation::clamped_silu)
      clamped_glu(out, gate, up, n, decoder.glu_slope, decoder.glu_limit);
    else
      glu(out, gate, up, n, decoder.activation);
  }

  // x += residual_scale · norm(branch)
  void add_branch(const float* branch, const NormView& norm) const {
    for (int m = 0; m < tokens(); ++m, branch += decoder.hidden) {
      if (norm.size) normalise<T>(h, branch, norm);
      add_scaled(x + m * decoder.hidden, decoder.residual_scale, norm.size ? h : branch, decoder.hidden);
    }
  }

  // Fetches the start of this thread's streams while other threads still work.
  void warm(const MatrixView& matrix) const {
    const Share rows = share(matrix);
    for (int stream = 0; stream < kStreams; ++stream) {
      const int64_t row = rows.begin + stream * ((rows.end - rows.begin) / kStreams);
      const char* first = reinterpret_cast<const char*>(weight_of(matrix) + row * matrix.stride);
      for (int at = 0; at < kAheadBytes; at += kLineBytes) __builtin_prefetch(first + at);
    }
  }

  template <class View>
  static const T* weight_of(const View& view) {
    return static_cast<const T*>(view.weight);
  }

  T* cached(void* cache, const LayerView& layer, const TokenView& token, int64_t head, int64_t dim) const {
    return static_cast<T*>(cache) + (token.sequence * layer.key_value_heads + head) * step.capacity * dim;
  }

  const StepView& step;
  const DecoderView& decoder;
  const StepScratch scratch;
  SpinBarrier& barrier;
  const int thread, threads;
  float* const x;
  float* const h;
};

template <class T>
void store_row(T* out, const float* values, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(values + i));
  for (; i < n; ++i) store_one(out + i, values[i]);
}

}  // namespace e3::E3_ISA_NAMESPACE
