// One decoding step of a few tokens through the kept layers: the part of one thread. Threads split the rows of every
// matrix and the context of the attention, and meet at a barrier between phases. Each keeps its own copy of the
// residual stream, so that norms and residual additions need no barrier. Activations and sums are fp32.
#pragma once

#include <limits>

#include "decode/decode_attention.h"
#include "decode/gemv.h"
#include "decode/glu.h"
#include "decode/rms_norm.h"
#include "decode/rotary.h"
#include "decode/spin_barrier.h"
#include "decode/step_scratch.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
class StepThread {
 public:
  StepThread(const StepView& step, SpinBarrier& barrier, int thread, int threads)
      : step_(step),
        d_(*step.decoder),
        scratch_(step, threads, step.scratch),
        barrier_(barrier),
        thread_(thread),
        threads_(threads),
        x_(scratch_.own + thread * scratch_.own_size),
        h_(x_ + StepScratch::own_residual(step)) {}

  void run() {
    embed();
    for (int i = 0; i < step_.layer_count; ++i) {
      const LayerView& layer = step_.layers[i];
      if (layer.attention) attention(layer, layer.mlp ? layer.gate : first_matrix(i + 1));
      if (layer.mlp) mlp(layer, first_matrix(i + 1));
    }
    logits();
  }

 private:
  void embed() {
    for (int m = 0; m < step_.token_count; ++m) {
      const T* row = static_cast<const T*>(d_.embedding.weight) + step_.tokens[m].id * d_.embedding.stride;
      std::fill_n(x_ + m * d_.hidden, d_.hidden, 0.0f);
      add_scaled(x_ + m * d_.hidden, d_.embedding_scale, row, d_.hidden);
    }
  }

  void attention(const LayerView& layer, const MatrixView& next) {
    const int64_t width = scratch_.query_width + 2 * scratch_.key_width;
    float* keys = scratch_.qkv + scratch_.query_width;
    const Vectors x = block_input(layer.attention_norm);
    project(layer.query, x, scratch_.qkv, width);
    project(layer.key, x, keys, width);
    project(layer.value, x, keys + scratch_.key_width, width);
    barrier_.wait();
    place_heads(layer);
    barrier_.wait();
    attend_own_part(layer);
    warm(layer.output);
    barrier_.wait();
    merge_parts();
    project(layer.output, {h_, scratch_.query_width, step_.token_count}, scratch_.branch, d_.hidden);
    warm(next);
    barrier_.wait();
    add_branch(layer.attention_post_norm);
  }

  void mlp(const LayerView& layer, const MatrixView& next) {
    const int64_t inner = scratch_.inner;
    const Vectors x = block_input(layer.mlp_norm);
    project(layer.gate, x, scratch_.gate, inner);
    project(layer.up, x, scratch_.up, inner);
    const Share own = share(layer.gate);
    for (int m = 0; m < step_.token_count; ++m)
      glu(scratch_.gate + m * inner + own.begin, scratch_.up + m * inner + own.begin, own.end - own.begin,
          d_.activation);
    warm(layer.down);
    barrier_.wait();
    project(layer.down, {scratch_.gate, inner, step_.token_count}, scratch_.branch, d_.hidden);
    warm(next);
    barrier_.wait();
    add_branch(layer.mlp_post_norm);
  }

  void logits() {
    for (int i = 0; i < step_.logit_count; ++i)
      rms_norm(h_ + i * d_.hidden, x_ + step_.logit_tokens[i] * d_.hidden, weight_of(d_.final_norm), d_.hidden,
               d_.final_norm.offset, d_.final_norm.eps);
    project(d_.head, {h_, d_.hidden, step_.logit_count}, step_.logits, d_.head.rows);
    const Share own = share(d_.head);
    for (int i = 0; i < step_.logit_count; ++i) {
      float* row = step_.logits + i * d_.head.rows;
      for (int64_t r = own.begin; r < own.end; ++r) row[r] *= d_.logit_scale;
      if (d_.logit_softcap != 0.0f)
        for (int64_t r = own.begin; r < own.end; ++r) row[r] = capped(row[r], d_.logit_softcap);
    }
  }

  // norm(x), or x itself for a block that normalises its output only (OLMo 2).
  Vectors block_input(const NormView& norm) {
    if (!norm.weight) return {x_, d_.hidden, step_.token_count};
    for (int m = 0; m < step_.token_count; ++m)
      rms_norm(h_ + m * d_.hidden, x_ + m * d_.hidden, weight_of(norm), d_.hidden, norm.offset, norm.eps);
    return {h_, d_.hidden, step_.token_count};
  }

  // x += residual_scale · norm(branch)
  void add_branch(const NormView& norm) {
    for (int m = 0; m < step_.token_count; ++m) {
      const float* branch = scratch_.branch + m * d_.hidden;
      if (norm.weight) {
        rms_norm(h_, branch, weight_of(norm), d_.hidden, norm.offset, norm.eps);
        branch = h_;
      }
      add_scaled(x_ + m * d_.hidden, d_.residual_scale, branch, d_.hidden);
    }
  }

  // Queries go to `queries`, keys and values to the cache.
  void place_heads(const LayerView& layer) {
    const int64_t heads = d_.heads + 2 * d_.key_value_heads;
    const Share own(step_.token_count * heads, thread_, threads_);
    for (int64_t item = own.begin; item < own.end; ++item) {
      const int64_t m = item / heads, head = item % heads;
      const TokenView& token = step_.tokens[m];
      const float* queries = scratch_.qkv + m * heads * d_.head_dim;
      const float* keys = queries + scratch_.query_width;
      const float* values = keys + scratch_.key_width;
      if (head < d_.heads) {
        float* out = scratch_.queries + m * scratch_.query_width + head * d_.head_dim;
        place_head(layer, layer.query_norm, token, queries, head, out);
      } else if (head < d_.heads + d_.key_value_heads) {
        place_head(layer, layer.key_norm, token, keys, head - d_.heads, h_);
        store_head(layer.keys, token, head - d_.heads, h_);
      } else {
        const int64_t index = head - d_.heads - d_.key_value_heads;
        store_head(layer.values, token, index, values + index * d_.head_dim);
      }
    }
  }

  // `all` is every head of the kind: a norm spans one head (Qwen 3) or all of them (OLMo 2).
  void place_head(const LayerView& layer, const NormView& norm, const TokenView& token, const float* all, int64_t head,
                  float* out) {
    const int64_t at = head * d_.head_dim;
    if (norm.weight) {
      const bool spans_all = norm.size != d_.head_dim;
      const float squares = sum_of_squares(spans_all ? all : all + at, norm.size);
      rms_scale(out, all + at, weight_of(norm) + (spans_all ? at : 0), d_.head_dim, norm.offset, squares, norm.size,
                norm.eps);
    } else {
      std::copy_n(all + at, d_.head_dim, out);
    }
    if (!layer.cos) return;
    const int64_t position = (token.slot - token.start) * layer.rotary_half;
    rotary(out, layer.cos + position, layer.sin + position, layer.rotary_half);
  }

  void store_head(void* cache, const TokenView& token, int64_t head, const float* values) {
    T* row = cached(cache, token, head) + token.slot * d_.head_dim;
    int64_t i = 0;
    for (; i + kLanes <= d_.head_dim; i += kLanes) store(row + i, load(values + i));
    for (; i < d_.head_dim; ++i) store_one(row + i, values[i]);
  }

  // This thread's part of every token's visible slots, for all heads.
  void attend_own_part(const LayerView& layer) {
    const int64_t group = d_.heads / d_.key_value_heads;
    for (int m = 0; m < step_.token_count; ++m) {
      const TokenView& token = step_.tokens[m];
      const int64_t end = token.slot + 1;
      const int64_t begin = layer.window ? std::max(token.start, end - layer.window) : token.start;
      const Share own(end - begin, thread_, threads_);
      for (int64_t head = 0; head < d_.heads; ++head) {
        const int64_t row = m * d_.heads + head;
        AttentionPart part{part_output(thread_, row), -std::numeric_limits<float>::infinity(), 0.0f};
        std::fill_n(part.output, d_.head_dim, 0.0f);
        attend(scratch_.queries + row * d_.head_dim, cached(layer.keys, token, head / group),
               cached(layer.values, token, head / group), begin + own.begin, begin + own.end, d_.head_dim, layer.scale,
               layer.softcap, part);
        scratch_.maxima[part_index(thread_, row)] = part.maximum;
        scratch_.totals[part_index(thread_, row)] = part.total;
      }
    }
  }

  // h ← the attention's output, Σ_t e^{m_t − m}·o_t / Σ_t e^{m_t − m}·z_t over the threads' parts.
  void merge_parts() {
    for (int64_t row = 0; row < step_.token_count * d_.heads; ++row) {
      float maximum = -std::numeric_limits<float>::infinity(), total = 0.0f;
      for (int t = 0; t < threads_; ++t) maximum = std::max(maximum, scratch_.maxima[part_index(t, row)]);
      for (int t = 0; t < threads_; ++t)
        total += softmax_rescale(scratch_.maxima[part_index(t, row)], maximum) * scratch_.totals[part_index(t, row)];
      float* out = h_ + row * d_.head_dim;
      std::fill_n(out, d_.head_dim, 0.0f);
      for (int t = 0; t < threads_; ++t)
        add_scaled(out, softmax_rescale(scratch_.maxima[part_index(t, row)], maximum) / total, part_output(t, row),
                   d_.head_dim);
    }
  }

  void project(const MatrixView& matrix, const Vectors& x, float* out, int64_t out_stride) {
    const Share rows = share(matrix);
    gemv(weight_of(matrix), matrix.stride, static_cast<const T*>(matrix.bias), rows.begin, rows.end, matrix.columns, x,
         out, out_stride);
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

  const MatrixView& first_matrix(int index) const {
    if (index == step_.layer_count) return d_.head;
    return step_.layers[index].attention ? step_.layers[index].query : step_.layers[index].gate;
  }

  Share share(const MatrixView& matrix) const { return Share(matrix.rows, thread_, threads_, kStreams); }

  template <class View>
  static const T* weight_of(const View& view) {
    return static_cast<const T*>(view.weight);
  }

  T* cached(void* cache, const TokenView& token, int64_t head) const {
    return static_cast<T*>(cache) + (token.sequence * d_.key_value_heads + head) * step_.capacity * d_.head_dim;
  }

  int64_t part_index(int thread, int64_t row) const { return thread * step_.token_count * d_.heads + row; }

  float* part_output(int thread, int64_t row) const { return scratch_.outputs + part_index(thread, row) * d_.head_dim; }

  const StepView& step_;
  const DecoderView& d_;
  const StepScratch scratch_;
  SpinBarrier& barrier_;
  const int thread_, threads_;
  float* const x_;
  float* const h_;
};

}  // namespace e3::E3_ISA_NAMESPACE
