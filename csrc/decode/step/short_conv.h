// The gated short convolution of a decoding step (ConvView). A thread convolves its own channels; slots of the padding
// take no part.
#pragma once

#include "decode/step/thread.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
void convolve_own_channels(const StepThread<T>& t, const LayerView& layer) {
  const ConvView& conv = layer.conv;
  const int64_t channels = layer.head_dim;
  const Share own(channels, t.thread, t.threads, kLanes);
  const T* weight = static_cast<const T*>(conv.weight);
  const T* bias = static_cast<const T*>(conv.bias);
  for (int m = 0; m < t.tokens(); ++m) {  // a token's slot is written before a later one of its sequence reads it
    const TokenView& token = t.step.tokens[m];
    const float *b = t.scratch.projected + m * 3 * channels, *c = b + channels, *x = c + channels;
    T* slots = t.cached(layer.keys, layer, token, 0, channels);
    for (int64_t i = own.begin; i < own.end; ++i) store_one(slots + token.slot * channels + i, b[i] * x[i]);
    const int64_t first = std::max(token.start, token.slot - conv.taps + 1);
    for (int64_t i = own.begin; i < own.end; ++i) {
      float total = bias ? load_one(bias + i) : 0.0f;
      for (int64_t slot = first; slot <= token.slot; ++slot)
        total += load_one(weight + i * conv.taps + conv.taps - 1 - (token.slot - slot)) *
                 load_one(slots + slot * channels + i);
      t.scratch.queries[m * channels + i] = c[i] * total;
    }
  }
}

template <class T>
void short_conv(const StepThread<T>& t, const LayerView& layer, const MatrixView& next) {
  t.project(layer.conv.input, t.block_input(layer.attention_norm), t.scratch.projected, layer.conv.input.rows);
  t.barrier.wait();
  convolve_own_channels(t, layer);
  t.warm(layer.output);
  t.barrier.wait();
  t.project(layer.output, {t.scratch.queries, layer.head_dim, t.step.token_count}, t.scratch.attended,
            t.decoder.hidden);
  t.warm(next);
  t.barrier.wait();
}

}  // namespace e3::E3_ISA_NAMESPACE
