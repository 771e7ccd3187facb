// How a decoding step divides its work and its working memory between threads.
#pragma once

#include <algorithm>

#include "decode/decoder_view.h"

namespace e3::E3_ISA_NAMESPACE {

// A thread's share [begin, end) of `count` items dealt in blocks.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int thread, int threads, int64_t block = 1) {
    const int64_t blocks = (count + block - 1) / block;
    begin = std::min(count, blocks * thread / threads * block);
    end = std::min(count, blocks * (thread + 1) / threads * block);
  }
};

// Floats laid out from `base` (64-byte aligned; null to measure `size` alone). What is "by thread" is written by one
// thread and read by all; `own` is read by its thread only.
struct StepScratch {
  int64_t size, query_width, key_width, inner, own_size;
  float* qkv;      // (token, query_width + 2·key_width): the projections
  float* queries;  // (token, query_width): normalised and rotated
  float* outputs;  // (thread, token, query_width): attention over the thread's part of the context
  float* maxima;   // (thread, token, head)
  float* totals;   // (thread, token, head)
  float* branch;   // (token, hidden): what a block adds to the residual stream
  float* gate;     // (token, inner)
  float* up;       // (token, inner)
  float* own;      // (thread, own_size)

  StepScratch(const StepView& step, int threads, float* base) {
    const DecoderView& decoder = *step.decoder;
    const int64_t tokens = step.token_count;
    query_width = decoder.heads * decoder.head_dim;
    key_width = decoder.key_value_heads * decoder.head_dim;
    inner = 0;
    for (int i = 0; i < step.layer_count; ++i) inner = std::max(inner, step.layers[i].gate.rows);
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      float* out = base ? base + used : nullptr;
      used += rounded(count);
      return out;
    };
    qkv = take(tokens * (query_width + 2 * key_width));
    queries = take(tokens * query_width);
    outputs = take(threads * tokens * query_width);
    maxima = take(threads * tokens * decoder.heads);
    totals = take(threads * tokens * decoder.heads);
    branch = take(tokens * decoder.hidden);
    gate = take(tokens * inner);
    up = take(tokens * inner);
    own_size = own_residual(step) + rounded(tokens * std::max(decoder.hidden, query_width));
    own = take(threads * own_size);
    size = used;
  }

  // Of a thread's own part, the residual stream comes first, the block's input after it.
  static int64_t own_residual(const StepView& step) { return rounded(step.token_count * step.decoder->hidden); }

 private:
  static int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }
};

}  // namespace e3::E3_ISA_NAMESPACE
