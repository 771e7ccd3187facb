// From logits to a token: the processors of Hugging Face's `generate` in its order (repetition penalty, no repeated
// n-grams, no early end, temperature, top-k, top-p, min-p), then the largest logit or a draw.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "decode/runtime_table.h"

namespace e3 {

struct Sampling {
  bool sample = false;
  double temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1;
  int64_t top_k = 0;                 // 0: all
  int64_t no_repeat_ngram_size = 0;  // 0: n-grams may be repeated
  int64_t min_new_tokens = 0;
  std::vector<int64_t> eos;
  uint64_t seed = 0;

  bool ends(int64_t token) const { return std::find(eos.begin(), eos.end(), token) != eos.end(); }

  void check() const {
    TORCH_CHECK_VALUE(temperature > 0, "temperature is ", temperature,
                      "; it must be positive (greedy: do_sample=False)");
    TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p is ", top_p, "; it must be in (0, 1]");
    TORCH_CHECK_VALUE(top_k >= 0, "top_k is ", top_k, "; it must be at least 0 (0: all)");
    TORCH_CHECK_VALUE(min_p >= 0 && min_p <= 1, "min_p is ", min_p, "; it must be in [0, 1]");
    TORCH_CHECK_VALUE(repetition_penalty > 0, "repetition_penalty is ", repetition_penalty, "; it must be positive");
    TORCH_CHECK_VALUE(no_repeat_ngram_size >= 0, "no_repeat_ngram_size is ", no_repeat_ngram_size,
                      "; it must be at least 0 (0: off)");
    TORCH_CHECK_VALUE(min_new_tokens >= 0, "min_new_tokens is ", min_new_tokens, "; it must be at least 0");
  }
};

// The tokens of one sequence so far, without its padding.
struct Context {
  std::vector<int64_t> tokens;
  int64_t prompt = 0;  // how many of them were given

  int64_t generated() const { return int64_t(tokens.size()) - prompt; }
};

// Uniform numbers in [0, 1) of one sequence, by counter from (seed, sequence).
class Uniform {
 public:
  Uniform(uint64_t seed, uint64_t sequence) : engine_(seed, sequence, 0) {}
  double next() {
    const uint64_t high = engine_() >> 5, low = engine_() >> 6;  // 27 + 26 bits
    return double((high << 26) | low) * 0x1p-53;
  }

 private:
  at::Philox4_32 engine_;
};

// The lowest index of the largest logit. Raises where a logit is NaN, the largest is infinite or no token is left.
inline int64_t index_of_largest(const float* logits, int64_t count) {
  const Largest largest = choose_runtime_table().largest(logits, count);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  TORCH_CHECK(!largest.nan && largest.value < kInfinity, "the logits of the next token are not finite");
  TORCH_CHECK(largest.value > -kInfinity,
              "no token is left: each has the logit -inf or is excluded by no_repeat_ngram_size or min_new_tokens");
  return largest.index;
}

class Sampler {
 public:
  Sampler(const Sampling& sampling, int64_t vocabulary) : sampling_(sampling), vocabulary_(vocabulary) {}

  // Probabilities of the next token after all processors. `logits` is overwritten.
  const std::vector<float>& probabilities(float* logits, const Context& context) {
    process(logits, context);
    const float largest = logits[index_of_largest(logits, vocabulary_)];
    probabilities_.assign(vocabulary_, 0.0f);
    const float threshold = sampling_.top_k && sampling_.top_k < vocabulary_ ? kth_largest(logits)
                                                                             : -std::numeric_limits<float>::infinity();
    double total = 0;
    for (int64_t i = 0; i < vocabulary_; ++i) {
      if (logits[i] < threshold) continue;
      probabilities_[i] = std::exp(float((logits[i] - largest) / sampling_.temperature));
      total += probabilities_[i];
    }
    if (sampling_.top_p < 1) total = keep_nucleus(total);
    if (sampling_.min_p > 0) total = keep_likely();
    for (float& probability : probabilities_) probability = float(probability / total);
    return probabilities_;
  }

  // Greedy decoding: the largest logit that the processors leave, the lowest index of equals.
  int64_t largest(float* logits, const Context& context) const {
    process(logits, context);
    return index_of_largest(logits, vocabulary_);
  }

  // The token whose share of the cumulated weights holds u ∈ [0, 1).
  static int64_t draw(const std::vector<float>& weights, double u) {
    double total = 0;
    for (const float weight : weights) total += weight;
    double rest = u * total;
    int64_t last = 0;
    for (int64_t i = 0; i < int64_t(weights.size()); ++i) {
      if (weights[i] <= 0) continue;
      last = i;
      rest -= weights[i];
      if (rest < 0) break;
    }
    return last;
  }

 private:
  // What greedy decoding and sampling share.
  void process(float* logits, const Context& context) const {
    if (sampling_.repetition_penalty != 1) penalise(logits, context.tokens);
    if (sampling_.no_repeat_ngram_size) exclude_repeats(logits, context.tokens);
    if (context.generated() < sampling_.min_new_tokens)
      for (const int64_t token : sampling_.eos) exclude(logits, token);
  }

  // Once for each distinct token: z/r where z > 0, z·r elsewhere.
  void penalise(float* logits, std::vector<int64_t> tokens) const {
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    const float penalty = float(sampling_.repetition_penalty);
    for (const int64_t token : tokens)
      if (token < vocabulary_) logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
  }

  // Every token that would complete an n-gram which `tokens` hold already.
  void exclude_repeats(float* logits, const std::vector<int64_t>& tokens) const {
    const int64_t before = sampling_.no_repeat_ngram_size - 1;  // tokens of the n-gram before its last
    if (int64_t(tokens.size()) <= before) return;
    const auto prefix = tokens.end() - before;
    for (auto ngram = tokens.begin(); ngram < prefix; ++ngram)
      if (std::equal(prefix, tokens.end(), ngram)) exclude(logits, ngram[before]);
  }

  // A prompt may hold tokens that the output head does not know, and so may `eos`.
  void exclude(float* logits, int64_t token) const {
    if (token >= 0 && token < vocabulary_) logits[token] = -std::numeric_limits<float>::infinity();
  }

  float kth_largest(const float* logits) {
    order_.assign(logits, logits + vocabulary_);
    std::nth_element(order_.begin(), order_.begin() + (sampling_.top_k - 1), order_.end(), std::greater<>());
    return order_[sampling_.top_k - 1];
  }

  // Keeps the smallest set of most probable tokens whose mass reaches top_p, and returns its mass.
  double keep_nucleus(double total) {
    std::vector<int64_t> heap;
    for (int64_t i = 0; i < vocabulary_; ++i)
      if (probabilities_[i] > 0) heap.push_back(i);
    const auto less_probable = [&](int64_t a, int64_t b) {
      return probabilities_[a] < probabilities_[b] || (probabilities_[a] == probabilities_[b] && a > b);
    };
    std::make_heap(heap.begin(), heap.end(), less_probable);
    double mass = 0;
    while (!heap.empty() && mass < sampling_.top_p * total) {
      mass += probabilities_[heap.front()];
      std::pop_heap(heap.begin(), heap.end(), less_probable);
      heap.pop_back();
    }
    for (const int64_t i : heap) probabilities_[i] = 0.0f;
    return mass;
  }

  // Keeps the tokens whose probability is at least min_p of the largest, which is still 1, and returns their mass.
  double keep_likely() {
    double mass = 0;
    for (float& probability : probabilities_) {
      if (probability < sampling_.min_p) probability = 0.0f;
      mass += probability;
    }
    return mass;
  }

  const Sampling sampling_;
  const int64_t vocabulary_;
  std::vector<float> probabilities_, order_;
};

}  // namespace e3
