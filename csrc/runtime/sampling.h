// From logits to a token: the processors of Hugging Face's `generate` in its order (repetition penalty, temperature,
// top-k, top-p), then the largest logit or a draw.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace e3 {

struct Sampling {
  bool sample = false;
  double temperature = 1, top_p = 1, repetition_penalty = 1;
  std::int64_t top_k = 0;  // 0: all
  std::uint64_t seed = 0;

  void check() const {
    TORCH_CHECK_VALUE(temperature > 0, "temperature is ", temperature,
                      "; it must be positive (greedy: do_sample=False)");
    TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "top_p is ", top_p, "; it must be in (0, 1]");
    TORCH_CHECK_VALUE(top_k >= 0, "top_k is ", top_k, "; it must be at least 0 (0: all)");
    TORCH_CHECK_VALUE(repetition_penalty > 0, "repetition_penalty is ", repetition_penalty, "; it must be positive");
  }
};

// Uniform numbers in [0, 1) of one sequence, by counter from (seed, sequence).
class Uniform {
 public:
  Uniform(std::uint64_t seed, std::uint64_t sequence) : engine_(seed, sequence, 0) {}
  double next() {
    const std::uint64_t high = engine_() >> 5, low = engine_() >> 6;  // 27 + 26 bits
    return double((high << 26) | low) * 0x1p-53;
  }

 private:
  at::Philox4_32 engine_;
};

class Sampler {
 public:
  Sampler(const Sampling& sampling, std::int64_t vocabulary) : sampling_(sampling), vocabulary_(vocabulary) {}

  // Probabilities of the next token after all processors; for greedy decoding all mass on the largest logit, the lowest
  // index of equals. `logits` is overwritten. `context` holds the tokens so far.
  const std::vector<float>& probabilities(float* logits, const std::vector<std::int64_t>& context) {
    penalise(logits, context);
    const float largest = *std::max_element(logits, logits + vocabulary_);
    TORCH_CHECK(std::isfinite(largest) && logits[0] == logits[0], "the logits of the next token are not finite");
    probabilities_.assign(vocabulary_, 0.0f);
    if (!sampling_.sample) {
      probabilities_[std::find(logits, logits + vocabulary_, largest) - logits] = 1.0f;
      return probabilities_;
    }
    const float threshold = sampling_.top_k && sampling_.top_k < vocabulary_ ? kth_largest(logits)
                                                                             : -std::numeric_limits<float>::infinity();
    double total = 0;
    for (std::int64_t i = 0; i < vocabulary_; ++i) {
      if (logits[i] < threshold) continue;
      probabilities_[i] = std::exp(float((logits[i] - largest) / sampling_.temperature));
      total += probabilities_[i];
    }
    if (sampling_.top_p < 1) total = keep_nucleus(total);
    for (float& probability : probabilities_) probability = float(probability / total);
    return probabilities_;
  }

  // Greedy decoding without the probabilities.
  std::int64_t largest(float* logits, const std::vector<std::int64_t>& context) const {
    penalise(logits, context);
    const float* best = std::max_element(logits, logits + vocabulary_);
    TORCH_CHECK(std::isfinite(*best) && logits[0] == logits[0], "the logits of the next token are not finite");
    return best - logits;
  }

  // The token whose share of the cumulated weights holds u ∈ [0, 1).
  static std::int64_t draw(const std::vector<float>& weights, double u) {
    double total = 0;
    for (const float weight : weights) total += weight;
    double rest = u * total;
    std::int64_t last = 0;
    for (std::int64_t i = 0; i < std::int64_t(weights.size()); ++i) {
      if (weights[i] <= 0) continue;
      last = i;
      rest -= weights[i];
      if (rest < 0) break;
    }
    return last;
  }

 private:
  // Once for each distinct token: z/r where z > 0, z·r elsewhere.
  void penalise(float* logits, const std::vector<std::int64_t>& context) const {
    if (sampling_.repetition_penalty == 1) return;
    std::vector<std::int64_t> distinct = context;
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    const float penalty = float(sampling_.repetition_penalty);
    for (const std::int64_t token : distinct)
      logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
  }

  float kth_largest(const float* logits) {
    order_.assign(logits, logits + vocabulary_);
    std::nth_element(order_.begin(), order_.begin() + (sampling_.top_k - 1), order_.end(), std::greater<>());
    return order_[sampling_.top_k - 1];
  }

  // Keeps the smallest set of most probable tokens whose mass reaches top_p, and returns its mass.
  double keep_nucleus(double total) {
    std::vector<std::int64_t> heap;
    for (std::int64_t i = 0; i < vocabulary_; ++i)
      if (probabilities_[i] > 0) heap.push_back(i);
    const auto less_probable = [&](std::int64_t a, std::int64_t b) {
      return probabilities_[a] < probabilities_[b] || (probabilities_[a] == probabilities_[b] && a > b);
    };
    std::make_heap(heap.begin(), heap.end(), less_probable);
    double mass = 0;
    while (!heap.empty() && mass < sampling_.top_p * total) {
      mass += probabilities_[heap.front()];
      std::pop_heap(heap.begin(), heap.end(), less_probable);
      heap.pop_back();
    }
    for (const std::int64_t i : heap) probabilities_[i] = 0.0f;
    return mass;
  }

  const Sampling sampling_;
  const std::int64_t vocabulary_;
  std::vector<float> probabilities_, order_;
};

}  // namespace e3
