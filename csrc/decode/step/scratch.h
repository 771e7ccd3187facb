// How a decoding step divides its work and its working memory between threads.
#pragma once

#include <algorithm>

#include "decode/decoder_view.h"

namespace e3::E3_ISA_NAMESPACE {

// A thread's share [begin, end) of `count` items dealt in blocks.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int thread, int threads, int64_t block = 1) {
    const int64_t blocks = (count + block - 1) / block;
    begin = std::min(count, blocks * thread / threads * block);
    end = std::min(count, blocks * (thread + 1) / threads * block);
  }
};

// One expert's work for one token. A step's are sorted by expert, then token, and numbered as "slots".
struct Routed {
  int expert, token;
  float weight;
};

// What one token of a layer needs.
struct LayerWidths {
  int64_t projected, queries, attended;

  explicit LayerWidths(const LayerView& layer) {
    const LatentView& latent = layer.latent;
    attended = layer.heads * layer.value_dim;
    if (layer.conv.taps) {
      projected = layer.conv.input.rows;
      queries = layer.head_dim;
    } else if (latent.rank) {
      projected = layer.query.rows + layer.key.rows;
      queries = layer.heads * std::max(layer.head_dim, latent.value_dim);
    } else {
      projected = (layer.heads + 2 * layer.key_value_heads) * layer.head_dim;
      queries = layer.heads * layer.head_dim;
    }
  }
};

// Floats laid out from `base` (64-byte aligned; null to measure `size` alone), each sized for the widest layer. What is
// "by thread" is written by one thread and read by all; `own` is read by its thread only.
struct StepScratch {
  int64_t size, own_size;
  float* narrow;     // (token, query_down.rows)
  float* projected;  // (token, projected): what the attention's input becomes
  float* queries;    // (token, queries): normalised and rotated
  float* outputs;    // (thread, token, attended): attention over the thread's part of the context
  float* maxima;     // (thread, token, head)
  float* totals;     // (thread, token, head)
  float* attended;   // (token, hidden): what attention adds to the residual stream
  float* branch;     // (token, hidden): what the MLP adds
  float* inputs;     // (layer, token, size of a layer's input)
  float* gate;       // (token, inner)
  float* up;         // (token, inner)
  float* router;     // (token, expert)
  float* gate_up;    // (slot, gate and up)
  float* activated;  // (slot, inner of an expert)
  float* down;       // (slot, hidden)
  float* own;        // (thread, own_size)

  StepScratch(const StepView& step, int threads, float* base) {
    const int64_t tokens = step.token_count, hidden = step.decoder->hidden;
    const auto widest = [&](const auto& width) {
      int64_t most = 0;
      for (int i = 0; i < step.layer_count; ++i) most = std::max(most, width(step.layers[i]));
      return most;
    };
    const int64_t heads = widest([](const LayerView& layer) { return layer.heads; });
    const int64_t attention = widest([](const LayerView& layer) { return LayerWidths(layer).attended; });
    const int64_t input = widest([](const LayerView& layer) { return layer.input.size; });
    const int64_t inner = std::max(input, widest([](const LayerView& layer) { return layer.gate.rows; }));
    const int64_t chosen = widest([](const LayerView& layer) { return layer.experts.router.chosen; });
    const int64_t routed_inner = widest([](const LayerView& layer) { return layer.experts.gate_up.first.rows; });
    const int64_t experts = widest([](const LayerView& layer) { return layer.experts.count; });
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      float* out = base ? base + used : nullptr;
      used += rounded(count);
      return out;
    };
    narrow = take(tokens * widest([](const LayerView& layer) { return layer.latent.query_down.rows; }));
    projected = take(tokens * widest([](const LayerView& layer) { return LayerWidths(layer).projected; }));
    queries = take(tokens * widest([](const LayerView& layer) { return LayerWidths(layer).queries; }));
    outputs = take(threads * tokens * attention);
    maxima = take(threads * tokens * heads);
    totals = take(threads * tokens * heads);
    attended = take(tokens * hidden);
    branch = take(tokens * hidden);
    inputs = take(step.layer_count * tokens * input);
    gate = take(tokens * inner);
    up = take(tokens * inner);
    router = take(tokens * experts);
    gate_up = take(tokens * chosen * routed_inner);
    activated = take(tokens * chosen * routed_inner / 2);
    down = take(tokens * chosen * hidden);
    const int64_t head_dim = widest([](const LayerView& layer) { return layer.head_dim; });
    const int64_t narrow_query = widest([](const LayerView& layer) { return layer.latent.query_down.rows; });
    own_residual = rounded(tokens * hidden);
    own_input = rounded(std::max({tokens * std::max({hidden, attention, narrow_query}), head_dim, input}));
    own_routed = rounded(tokens * chosen * int64_t(sizeof(Routed) / sizeof(float)));
    own_size = own_residual + own_input + own_routed + rounded(chosen ? tokens * hidden : 0) + rounded(2 * experts);
    own = take(threads * own_size);
    size = used;
  }

  // Of a thread's own part: the residual stream, the block's input, the experts' work, the inputs of one expert,
  // scores.
  float* residual(int thread) const { return own + thread * own_size; }
  float* input(int thread) const { return residual(thread) + own_residual; }
  Routed* routed(int thread) const { return reinterpret_cast<Routed*>(input(thread) + own_input); }
  float* gathered(int thread) const { return input(thread) + own_input + own_routed; }
  float* scores(int thread, int64_t experts) const { return residual(thread) + own_size - rounded(2 * experts); }

 private:
  static int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }

  int64_t own_residual, own_input, own_routed;
};

}  // namespace e3::E3_ISA_NAMESPACE
