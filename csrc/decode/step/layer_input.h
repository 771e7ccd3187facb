// What the layers of a decoding step add from embeddings of their own (LayerInputView).
#pragma once

#include "decode/step/thread.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
float* layer_input(const StepThread<T>& t, int index) {
  return t.scratch.inputs + index * t.tokens() * t.step.layers[index].input.size;
}

// This thread's rows of every layer's projection of the embedded tokens; what follows them waits at a barrier first.
template <class T>
void project_layer_inputs(const StepThread<T>& t) {
  for (int i = 0; i < t.step.layer_count; ++i) {
    const LayerInputView& input = t.step.layers[i].input;
    if (input.size)
      t.project(input.projection, {t.x, t.decoder.hidden, t.step.token_count}, layer_input(t, i), input.size);
  }
}

template <class T>
void add_layer_input(const StepThread<T>& t, int index, const MatrixView& next) {
  const LayerInputView& input = t.step.layers[index].input;
  t.project(input.gate, {t.x, t.decoder.hidden, t.step.token_count}, t.scratch.gate, input.size);
  const Share own = t.share(input.gate);
  for (int m = 0; m < t.tokens(); ++m) {
    // Each thread normalises the whole row for itself, in h, and uses its own part.
    const float* projected = layer_input(t, index) + m * input.size;
    for (int64_t i = 0; i < input.size; ++i) t.h[i] = input.projection_scale * projected[i];
    normalise<T>(t.h, t.h, input.norm);
    add_scaled(t.h, input.embedding_scale, static_cast<const T*>(input.embedding) + t.step.tokens[m].id * input.stride,
               input.size);
    float* gate = t.scratch.gate + m * input.size;
    activate(gate + own.begin, own.end - own.begin, t.decoder.activation);
    for (int64_t i = own.begin; i < own.end; ++i) gate[i] *= input.scale * t.h[i];
  }
  t.warm(input.output);
  t.barrier.wait();
  t.project(input.output, {t.scratch.gate, input.size, t.step.token_count}, t.scratch.branch, t.decoder.hidden);
  t.warm(next);
  t.barrier.wait();
  t.add_branch(t.scratch.branch, input.output_norm);
}

} // namespace e3::E3_ISA_NAMESPACE
