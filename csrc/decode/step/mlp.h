// The feed-forward block of a decoding step: an MLP, gated or not, experts, or both side by side.
#pragma once

#include "decode/step/experts.h"

namespace e3::E3_ISA_NAMESPACE {

// This thread's units of act(gate), times `up` where there is one.
template <class T>
void activate_mlp(const StepThread<T>& t, const LayerView& layer, const Vectors& input) {
  const int64_t inner = layer.gate.rows;
  t.project(layer.gate, input, t.scratch.gate, inner);
  if (layer.up.weight) t.project(layer.up, input, t.scratch.up, inner);
  const Share own = t.share(layer.gate);
  for (int m = 0; m < t.tokens(); ++m) {
    float* gate = t.scratch.gate + m * inner + own.begin;
    if (layer.up.weight)
      t.gated(gate, gate, t.scratch.up + m * inner + own.begin, own.end - own.begin);
    else
      activate(gate, own.end - own.begin, t.decoder.activation);
  }
}

template <class T>
void mlp(const StepThread<T>& t, const LayerView& layer, const MatrixView& next) {
  const Vectors input = t.block_input(layer.mlp_norm);
  const ExpertsOfStep<T> experts(t, layer.experts);
  if (layer.experts.count) experts.route(input);
  if (layer.gate.weight) activate_mlp(t, layer, input);
  if (layer.gate.weight) t.warm(layer.down);
  t.barrier.wait();
  if (layer.experts.count) {
    experts.activate(input);
    t.barrier.wait();
  }
  const Share own = t.share(t.decoder.hidden);
  if (layer.gate.weight)
    t.project(layer.down, {t.scratch.gate, layer.gate.rows, t.step.token_count}, t.scratch.branch, t.decoder.hidden);
  else
    for (int m = 0; m < t.tokens(); ++m)
      std::fill(t.scratch.branch + m * t.decoder.hidden + own.begin, t.scratch.branch + m * t.decoder.hidden + own.end,
                0.0f);
  if (layer.experts.count) experts.add_to_branch();
  t.warm(next);
  t.barrier.wait();
}

}  // namespace e3::E3_ISA_NAMESPACE
