// The sampler of logits in host memory.
#pragma once

#include "decode/runtime_table.h"
#include "torch/runtime/sampler.h"

namespace e3 {

class HostSampler final : public Sampler {
 public:
  using Sampler::Sampler;

  Choices largest(const at::Tensor& logits, const Contexts& contexts) override {
    Choices out;
    for (size_t i = 0; i < contexts.size(); ++i) {
      float* row = row_of(logits, i);
      process(row, *contexts[i]);
      const Largest found = largest_of(row);
      out.tokens.push_back(found.index);
      out.largest.push_back(found.value);
    }
    return out;
  }

  std::pair<at::Tensor, at::Tensor> probabilities(const at::Tensor& logits, const Contexts& contexts) override {
    at::Tensor largest = at::empty({int64_t(contexts.size())}, at::kDouble);
    for (size_t i = 0; i < contexts.size(); ++i) {
      float* row = row_of(logits, i);
      process(row, *contexts[i]);
      const float found = largest_of(row).value;
      largest.data_ptr<double>()[i] = found;
      if (std::isfinite(found)) to_probabilities(row, found);
    }
    return {logits, largest};
  }

  at::Tensor draw(const at::Tensor& weights, const std::vector<double>& uniforms) override {
    at::Tensor tokens = at::empty({int64_t(uniforms.size())}, at::kLong);
    for (size_t i = 0; i < uniforms.size(); ++i) tokens.data_ptr<int64_t>()[i] = drawn(row_of(weights, i), uniforms[i]);
    return tokens;
  }

 private:
  float* row_of(const at::Tensor& rows, size_t i) const {
    TORCH_INTERNAL_ASSERT(rows.is_cpu());
    return rows.data_ptr<float>() + int64_t(i) * vocabulary_;
  }

  // NaN as the value where any logit is.
  Largest largest_of(const float* logits) const {
    Largest found = choose_runtime_table().largest(logits, vocabulary_);
    if (found.nan) found.value = std::numeric_limits<float>::quiet_NaN();
    return found;
  }

  // What greedy decoding and sampling share; the penalty is z/r where z > 0, z·r elsewhere.
  void process(float* logits, const Context& context) const {
    const float penalty = float(sampling_.repetition_penalty);
    if (penalty != 1)
      for (const int64_t token : context.distinct(vocabulary_))
        logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
    for (const int64_t token : context.excluded(sampling_, vocabulary_))
      logits[token] = -std::numeric_limits<float>::infinity();
  }

  // In place.
  void to_probabilities(float* row, float largest) {
    const float threshold =
        sampling_.top_k && sampling_.top_k < vocabulary_ ? kth_largest(row) : -std::numeric_limits<float>::infinity();
    double total = 0;
    for (int64_t i = 0; i < vocabulary_; ++i) {
      row[i] = row[i] < threshold ? 0.0f : std::exp(float((row[i] - largest) / sampling_.temperature));
      total += row[i];
    }
    if (sampling_.top_p < 1) total = keep_nucleus(row, total);
    if (sampling_.min_p > 0) total = keep_likely(row);
    for (int64_t i = 0; i < vocabulary_; ++i) row[i] = float(row[i] / total);
  }

  float kth_largest(const float* logits) {
    order_.assign(logits, logits + vocabulary_);
    std::nth_element(order_.begin(), order_.begin() + (sampling_.top_k - 1), order_.end(), std::greater<>());
    return order_[sampling_.top_k - 1];
  }

  // Keeps the smallest set of most probable tokens whose mass reaches top_p, and returns its mass.
  double keep_nucleus(float* probabilities, double total) const {
    std::vector<int64_t> heap;
    for (int64_t i = 0; i < vocabulary_; ++i)
      if (probabilities[i] > 0) heap.push_back(i);
    const auto less_probable = [&](int64_t a, int64_t b) {
      return probabilities[a] < probabilities[b] || (probabilities[a] == probabilities[b] && a > b);
    };
    std::make_heap(heap.begin(), heap.end(), less_probable);
    double mass = 0;
    while (!heap.empty() && mass < sampling_.top_p * total) {
      mass += probabilities[heap.front()];
      std::pop_heap(heap.begin(), heap.end(), less_probable);
      heap.pop_back();
    }
    for (const int64_t i : heap) probabilities[i] = 0.0f;
    return mass;
  }

  // Keeps the tokens whose probability is at least min_p of the largest, which is still 1, and returns their mass.
  double keep_likely(float* probabilities) const {
    double mass = 0;
    for (int64_t i = 0; i < vocabulary_; ++i) {
      if (probabilities[i] < sampling_.min_p) probabilities[i] = 0.0f;
      mass += probabilities[i];
    }
    return mass;
  }

  int64_t drawn(const float* weights, double u) const {
    double total = 0;
    for (int64_t i = 0; i < vocabulary_; ++i) total += weights[i];
    double rest = u * total;
    int64_t last = 0;
    for (int64_t i = 0; i < vocabulary_; ++i) {
      if (weights[i] <= 0) continue;
      last = i;
      rest -= weights[i];
      if (rest < 0) break;
    }
    return last;
  }

  std::vector<float> order_;
};

}  // namespace e3
