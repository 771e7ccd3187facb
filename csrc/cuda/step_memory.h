// The working memory of a step on the device, which every captured graph of a model shares.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/attention.cuh"
#include "cuda/device_array.h"

namespace e3::cuda {

// A vector of `width` floats for each token of a step.
class TokenVectors {
 public:
  explicit TokenVectors(int64_t width) : stride_((width + 3) / 4 * 4), values_(size_t(stride_) * kMaxTokens) {}
  Rows rows() const { return {values_.data(), stride_}; }

 private:
  int64_t stride_;
  DeviceArray<float> values_;
};

struct StepMemory {
  static constexpr int kMaxParts = 16;

  DeviceArray<StepState> state{1};
  DeviceArray<LayerState> layer_states;
  TokenVectors x, h, qkv, queries, branch, inner;
  DeviceArray<float> outputs, maxima, totals;  // of the parts of the attention

  StepMemory(const DecoderView& decoder, const std::vector<LayerView>& layers)
      : layer_states(layers.size()),
        x(decoder.hidden),
        h(std::max(decoder.hidden, decoder.heads * decoder.head_dim)),
        qkv((decoder.heads + 2 * decoder.key_value_heads) * decoder.head_dim),
        queries(decoder.heads * decoder.head_dim),
        branch(decoder.hidden),
        inner(widest(layers)),
        outputs(size_t(kMaxParts * kMaxTokens * decoder.heads * decoder.head_dim)),
        maxima(size_t(kMaxParts * kMaxTokens * decoder.heads)),
        totals(size_t(kMaxParts * kMaxTokens * decoder.heads)) {}

  AttentionParts parts(int count) const { return {outputs.data(), maxima.data(), totals.data(), count}; }

 private:
  static int64_t widest(const std::vector<LayerView>& layers) {
    int64_t width = 0;
    for (const LayerView& layer : layers) width = std::max(width, layer.gate.rows);
    return width;
  }
};

}  // namespace e3::cuda
