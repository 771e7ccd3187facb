// The decoder as the kernels see it: raw pointers into weights and caches that others own, all of one storage type.
#pragma once

#include <cstdint>

#include "decode/activation.h"

namespace e3 {

// (rows, columns), dense columns; `bias` may be null.
struct MatrixView {
  const void* weight = nullptr;
  const void* bias = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;
};

// `size` elements are normalised together; a null weight means no normalisation.
struct NormView {
  const void* weight = nullptr;
  int64_t size = 0;
  float eps = 0;
  float offset = 0;
};

// One kept layer of one request. The caches are (sequence, key/value head, capacity, head_dim), dense.
struct LayerView {
  bool attention = true;
  bool mlp = true;
  NormView attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, query_norm, key_norm;
  MatrixView query, key, value, output, gate, up, down;
  const float* cos = nullptr;  // (position, rotary_half); null: this layer has no rotary embedding
  const float* sin = nullptr;
  int64_t rotary_half = 0;
  float scale = 1;
  float softcap = 0;        // 0: none
  int64_t window = 0;  // a query sees this many last positions, itself included; 0: all
  void* keys = nullptr;
  void* values = nullptr;
};

// One token of the step: its place in the cache is (sequence, slot); slots before `start` are padding.
struct TokenView {
  int64_t id;
  int64_t sequence;
  int64_t slot;
  int64_t start;
};

struct DecoderView {
  int64_t hidden, heads, key_value_heads, head_dim;
  Activation activation;
  MatrixView embedding, head;
  NormView final_norm;
  float embedding_scale, residual_scale, logit_scale, logit_softcap;  // a softcap of 0: none
};

struct StepView {
  const DecoderView* decoder;
  const LayerView* layers;
  int layer_count;
  int64_t capacity;  // slots of a sequence's cache
  const TokenView* tokens;
  int token_count;
  const int* logit_tokens;  // which tokens get logits
  int logit_count;
  float* logits;   // (logit_count, vocabulary)
  float* scratch;  // RuntimeTable::scratch_size floats
};

}  // namespace e3
