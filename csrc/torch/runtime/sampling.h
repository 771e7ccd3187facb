// From logits to a token: the processors of Hugging Face's `generate` in its order (repetition penalty, temperature,
// top-k, top-p), then the largest logit or a draw.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/PhiloxRNGEngine.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
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

// The largest of `count` logits and whether one of them is NaN, in vectors: this runs once a token on one thread.
inline std::pair<float, bool> largest_and_nan(const float* logits, std::int64_t count) {
  typedef float Vector __attribute__((vector_size(16)));
  typedef std::int32_t Mask __attribute__((vector_size(16)));
  constexpr int kLanes = 4, kVectors = 8, kStep = kLanes * kVectors;
  float largest = -std::numeric_limits<float>::infinity();
  Vector maxima[kVectors];
  Mask nans{};
  std::fill_n(maxima, kVectors, Vector{} + largest);
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    for (int v = 0; v < kVectors; ++v) {
      Vector x;
      std::memcpy(&x, logits + i + v * kLanes, sizeof x);
      maxima[v] = x > maxima[v] ? x : maxima[v];
      nans |= x != x;
    }
  bool nan = nans[0] | nans[1] | nans[2] | nans[3];
  for (const Vector& lanes : maxima)
    for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, lanes[lane]);
  for (; i < count; ++i) {
    largest = std::max(largest, logits[i]);
    nan |= logits[i] != logits[i];
  }
  return {largest, nan};
}

// The lowest index of the largest logit. Raises where a logit is NaN or the largest is infinite.
inline std::int64_t index_of_largest(const float* logits, std::int64_t count) {
  constexpr std::int64_t kBlock = 4096;
  const float* best = logits;
  float largest = -std::numeric_limits<float>::infinity();
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const auto [of_block, nan] = largest_and_nan(logits + begin, std::min(kBlock, count - begin));
    TORCH_CHECK(!nan, "the logits of the next token are not finite");
    if (of_block > largest) {
      largest = of_block;
      best = logits + begin;
    }
  }
  TORCH_CHECK(std::isfinite(largest), "the logits of the next token are not finite");
  return std::find(best, logits + count, largest) - logits;
}

class Sampler {
 public:
  Sampler(const Sampling& sampling, std::int64_t vocabulary) : sampling_(sampling), vocabulary_(vocabulary) {}

  // Probabilities of the next token after all processors. `logits` is overwritten; `context` holds the tokens so far.
  const std::vector<float>& probabilities(float* logits, const std::vector<std::int64_t>& context) {
    penalise(logits, context);
    const float largest = logits[index_of_largest(logits, vocabulary_)];
    probabilities_.assign(vocabulary_, 0.0f);
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

  // Greedy decoding: the largest logit after the repetition penalty, the lowest index of equals.
  std::int64_t largest(float* logits, const std::vector<std::int64_t>& context) const {
    penalise(logits, context);
    return index_of_largest(logits, vocabulary_);
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
