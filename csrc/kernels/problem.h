// What an operation is asked to compute: plain values, the same for every instruction set. Names follow
// docs/dispatcher.md.
#pragma once

#include <cstdint>

#include "simd/rows.h"
#include "simd/transform.h"

namespace e3 {

enum class Weighting : int { none, entropy, inverse, mix };
enum class Divergence : int { forward, reverse, jsd, adaptive };
enum class Tail : int { bucket, renorm, truncated };
enum class Reduction : int { none, mean, sum };
enum class Relaxation : int { threshold, softmax, successive };

// Whether KL(p‖q), and whether KL(q‖p), is a part of the divergence.
constexpr bool has_forward(Divergence d) { return d == Divergence::forward || d == Divergence::adaptive; }
constexpr bool has_reverse(Divergence d) { return d == Divergence::reverse || d == Divergence::adaptive; }

// loss = Σ w·[λT²·D + (1−λ)·CE] / norm over the valid tokens; see Weighting for w.
struct Objective {
  Weighting weighting;
  double gamma;
  double kd_ratio;
  double temperature;
  Reduction reduction;
  const double* num_items;  // replaces Σw in the mean; null: Σw
};

struct Tokens {
  int64_t count;
  const int64_t* labels;  // null: no labels
  const bool* mask;       // null: every token
  int64_t ignore_index;
  [[gnu::always_inline]] bool valid(int64_t token) const {
    return (mask == nullptr || mask[token]) && (labels == nullptr || labels[token] != ignore_index);
  }
};

struct EntropyKl {
  int64_t vocabulary;
  Tokens tokens;
  Rows student;
  Rows teacher;
  Transform student_transform;
  Transform teacher_transform;
  Divergence divergence;
  double beta;
  Objective objective;
};

struct TopkKl {
  int64_t vocabulary;
  int64_t k;
  Tokens tokens;
  Rows student;
  const float* teacher_logprobs;  // (count, k), contiguous; −∞ marks padding
  const int64_t* teacher_ids;     // (count, k), contiguous
  Transform transform;
  Tail tail;
  Divergence divergence;
  double beta;
  Objective objective;
};

// Where a forward pass writes. `stats` has 4 rows of `count`: divergence, teacher entropy, cross-entropy, weight.
struct LossOutput {
  float* loss;          // one value, or one a token with Reduction::none
  float* stats;
  void* grad;           // null: value only; rows of the vocabulary's length, no gap
  bool stream;          // write the gradient past the caches
};

// All of one dtype, fp32 or bf16; out (rows, vocabulary) without gaps.
struct LinearLogits {
  int64_t rows;
  int64_t width;
  int64_t vocabulary;
  Rows hidden;
  Rows weight;
  const void* bias;  // null: none
  void* out;
};

// All of one dtype, fp32 or bf16; out (rows, width) without gaps.
struct LinearGradHidden {
  int64_t rows;
  int64_t width;
  int64_t vocabulary;
  Rows grad;
  Rows weight;
  void* out;
};

struct GumbelTopk {
  Rows logits;
  int64_t column_stride;
  int64_t rows;
  int64_t length;
  int64_t k;
  double tau;
  double noise_scale;
  uint64_t seed;
  uint64_t step;
  Relaxation relaxation;
};

// Contiguous, of the logits' shape and dtype.
struct GumbelIncoming {
  const void* grad;
  const void* probs;
};

struct GatedResidual {
  DType dtype;
  int64_t rows;
  int64_t columns;
  const void* hidden;
  const void* branch;
  const void* gate;
  DType gate_dtype;
  bool gate_by_element;  // one value an element, else one a row
};

}  // namespace e3
