// The decoder as the kernels see it: raw pointers into weights and caches that others own, all of one storage type but
// where a field says otherwise. A family of models is a set of independent facts; a fact that is absent is null or 0.
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

// `size` elements are normalised together (0: no normalisation); a null weight is 1, a null bias 0.
struct NormView {
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* const* by_head = nullptr;  // weights of each head's own in place of `weight`
  int64_t size = 0;
  float eps = 0;
  float offset = 0;      // added to the weight
  bool centred = false;  // LayerNorm: the mean is taken off
};

// The matrices of several experts, that of expert e being e·step elements on and its bias e·rows.
struct ExpertMatrixView {
  MatrixView first;
  int64_t step = 0;
  bool by_input = false;  // stored (columns, rows), dense rows
};

// Chooses experts for a token and weighs them: scores are softmax or sigmoid of the router's logits. The largest of
// scores + correction are chosen, from the `kept_groups` of `groups` whose two largest have the largest sum.
struct RouterView {
  MatrixView matrix;
  bool fp32 = false;  // the matrix and its bias are, whatever the storage type is
  const float* correction = nullptr;
  bool sigmoid = false;
  bool normalised = false;  // the weights of the chosen sum to `scale`
  float scale = 1;
  int64_t chosen = 0, groups = 1, kept_groups = 1;
};

// A sum over the chosen experts of weight·down(act(gate)·up); gate and up are halves of one matrix or in turn in it.
struct ExpertsView {
  int64_t count = 0;  // 0: none
  RouterView router;
  ExpertMatrixView gate_up, down;
  bool in_turn = false;
};

// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads are products of one latent
// vector per token, which is what the cache holds, with the rotated part that all keys share behind it. `up` is (heads,
// plain + value_dim, rank): a head's keys, then its values. The query may pass through a narrow vector of its own.
struct LatentView {
  int64_t rank = 0;  // 0: attention is not latent
  int64_t plain = 0, rotated = 0, value_dim = 0;
  MatrixView query_down, up;
  NormView query_norm, norm;
};

// A gated short convolution in place of attention (LFM2): output(c ∘ conv(b ∘ x)), (b, c, x) = input(h), causal with
// `taps` of every channel. The cache holds b ∘ x.
struct ConvView {
  int64_t taps = 0;  // 0: none
  MatrixView input;
  const void* weight = nullptr;  // (channel, taps)
  const void* bias = nullptr;
};

// What a layer adds to the residual stream from an embedding of its own (Gemma 3n and 4). With e the token's row of
// that embedding and x₀ its row of the model's:
//   i = scale·(norm(projection_scale·projection(x₀)) + embedding_scale·e),  x += output_norm(output(act(gate(x)) ∘ i))
struct LayerInputView {
  int64_t size = 0;  // 0: none
  const void* embedding = nullptr;
  int64_t stride = 0;
  float embedding_scale = 1, projection_scale = 1, scale = 1;
  MatrixView projection, gate, output;
  NormView norm, output_norm;
};

// One kept layer of one request. The caches are (sequence, key/value head, capacity, dimension), dense.
struct LayerView {
  bool attention = true;
  bool mlp = true;
  bool parallel = false;  // both blocks read the layer's input; else the MLP reads what attention left
  int64_t heads = 0, key_value_heads = 0;
  int64_t head_dim = 0;  // of queries and keys, as the cache holds them
  int64_t value_dim = 0;  // of values
  NormView attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, query_norm, key_norm, value_norm;
  // Without `value` the keys' projection is the values' too; without `key` the caches are another layer's.
  MatrixView query, key, value, output;
  MatrixView gate, up, down;  // without `up` the MLP is down(act(gate)), without `gate` there is none
  LatentView latent;
  ConvView conv;
  ExpertsView experts;
  LayerInputView input;
  const float* cos = nullptr;  // (position, rotary_half); null: this layer has no rotary embedding
  const float* sin = nullptr;
  int64_t rotary_half = 0;
  bool rotary_in_turn = false;  // pairs are neighbours; else they lie rotary_half apart
  const void* sinks = nullptr;  // (heads): a score that takes its share of the softmax and has no value
  float scale = 1;
  float softcap = 0;   // 0: none
  int64_t window = 0;  // a query sees this many last positions, itself included; 0: all
  float output_scale = 1;  // of the residual stream, behind the layer
  void* keys = nullptr;
  void* values = nullptr;  // null where they are the first elements of the keys
};

// One token of the step: its place in the cache is (sequence, slot); slots before `start` are padding.
struct TokenView {
  int64_t id;
  int64_t sequence;
  int64_t slot;
  int64_t start;
};

struct DecoderView {
  int64_t hidden;
  int64_t heads, key_value_heads, head_dim;  // of the first layer: the graph of csrc/cuda runs layers that are alike
  Activation activation;
  float glu_slope, glu_limit;  // of Activation::clamped_silu
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
