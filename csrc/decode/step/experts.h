// Experts of a decoding step (ExpertsView): routed to by token, run by expert, so that a weight is read once whatever
// the number of tokens that chose it. A token's experts are summed by their index: its bits do not depend on the
// others.
#pragma once

#include <new>

#include "decode/step/thread.h"

namespace e3::E3_ISA_NAMESPACE {

// The index of the largest of `count` scores, the lowest of it, which is then taken out.
inline int take_largest(float* scores, int64_t count) {
  const int found = int(std::max_element(scores, scores + count) - scores);
  scores[found] = -std::numeric_limits<float>::infinity();
  return found;
}

// Takes out the groups whose two largest scores have the smallest sums; `sums` holds a float for each group.
inline void keep_groups(const RouterView& router, float* scores, int64_t count, float* sums) {
  const int64_t size = count / router.groups;
  for (int64_t g = 0; g < router.groups; ++g) {
    float first = -kInfinity, second = -kInfinity;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      second = std::max(second, std::min(first, scores[i]));
      first = std::max(first, scores[i]);
    }
    sums[g] = first + second;
  }
  for (int64_t taken = router.kept_groups; taken < router.groups; ++taken) {
    int64_t least = 0;  // of equal sums the last
    for (int64_t g = 1; g < router.groups; ++g)
      if (sums[g] <= sums[least]) least = g;
    sums[least] = kInfinity;
    std::fill_n(scores + least * size, size, -kInfinity);
  }
}

inline float of_logit(const RouterView& router, float logit, float maximum) {
  return router.sigmoid ? 1.0f / (1.0f + std::exp(-logit)) : std::exp(logit - maximum);
}

// Appends the experts of one token to `out`. `scores` holds 2·count floats.
inline void choose(const ExpertsView& experts, const float* logits, int token, float* scores, Routed* out) {
  const RouterView& router = experts.router;
  const float maximum = *std::max_element(logits, logits + experts.count);
  float total = 0.0f;
  for (int64_t e = 0; e < experts.count; ++e) {
    // Softmax keeps the order of the logits.
    scores[e] = router.sigmoid ? of_logit(router, logits[e], maximum) : logits[e];
    if (router.correction) scores[e] += router.correction[e];
  }
  if (router.kept_groups < router.groups) keep_groups(router, scores, experts.count, scores + experts.count);
  for (int64_t k = 0; k < router.chosen; ++k) {
    const int expert = take_largest(scores, experts.count);
    new (out + k) Routed{expert, token, of_logit(router, logits[expert], maximum)};
    total += out[k].weight;
  }
  if (!router.normalised && router.sigmoid) total = 1.0f;
  if (!router.normalised && !router.sigmoid) {
    total = 0.0f;
    for (int64_t e = 0; e < experts.count; ++e) total += of_logit(router, logits[e], maximum);
  }
  for (int64_t k = 0; k < router.chosen; ++k) out[k].weight *= router.scale / total;
}

template <class T>
class ExpertsOfStep {
 public:
  ExpertsOfStep(const StepThread<T>& thread, const ExpertsView& experts)
      : t_(thread),
        experts_(experts),
        routed_(thread.scratch.routed(thread.thread)),
        count_(thread.tokens() * experts.router.chosen),
        inner_(experts.gate_up.first.rows / 2) {}

  // This thread's rows of the router's logits.
  void route(const Vectors& input) const {
    const MatrixView& matrix = experts_.router.matrix;
    if (!experts_.router.fp32) return t_.project(matrix, input, t_.scratch.router, matrix.rows);
    const Share rows = t_.share(matrix);
    gemv(static_cast<const float*>(matrix.weight), matrix.stride, static_cast<const float*>(matrix.bias), rows.begin,
         rows.end, matrix.columns, input, t_.scratch.router, matrix.rows);
  }

  // The choice, which every thread makes for itself, and this thread's part of the chosen experts' act(gate)·up.
  void activate(const Vectors& input) const {
    const int64_t chosen = experts_.router.chosen;
    float* scores = t_.scratch.scores(t_.thread, experts_.count);
    for (int m = 0; m < t_.tokens(); ++m)
      choose(experts_, t_.scratch.router + m * experts_.count, m, scores, routed_ + m * chosen);
    std::sort(routed_, routed_ + count_, [](const Routed& a, const Routed& b) {
      return a.expert != b.expert ? a.expert < b.expert : a.token < b.token;
    });
    const Share own = t_.share(inner_);
    each_expert([&](int64_t first, int64_t last) {
      project(experts_.gate_up, first, gather(input, first, last), t_.scratch.gate_up);
      for (int64_t slot = first; slot < last; ++slot) unit(slot, own);
    });
  }

  // branch += Σ weight·down(activated), this thread's rows of it.
  void add_to_branch() const {
    const int64_t hidden = t_.decoder.hidden;
    each_expert([&](int64_t first, int64_t last) {
      const Vectors input{t_.scratch.activated + first * inner_, inner_, int(last - first)};
      project(experts_.down, first, input, t_.scratch.down);
    });
    const Share own = t_.share(hidden);
    for (int64_t slot = 0; slot < count_; ++slot)
      add_scaled(t_.scratch.branch + routed_[slot].token * hidden + own.begin, routed_[slot].weight,
                 t_.scratch.down + slot * hidden + own.begin, own.end - own.begin);
  }

 private:
  // Calls visit(first, last) for the slots of every expert that was chosen.
  template <class Visit>
  void each_expert(const Visit& visit) const {
    for (int64_t first = 0, last; first < count_; first = last) {
      for (last = first; last < count_ && routed_[last].expert == routed_[first].expert;) ++last;
      visit(first, last);
    }
  }

  // The inputs of the slots side by side.
  Vectors gather(const Vectors& input, int64_t first, int64_t last) const {
    if (input.count == 1) return input;
    float* out = t_.scratch.gathered(t_.thread);
    for (int64_t slot = first; slot < last; ++slot)
      std::copy_n(input.data + routed_[slot].token * input.stride, t_.decoder.hidden,
                  out + (slot - first) * t_.decoder.hidden);
    return {out, t_.decoder.hidden, int(last - first)};
  }

  // This thread's rows of an expert's product for its slots: all of `down`; of gate and up the same units.
  void project(const ExpertMatrixView& matrices, int64_t first, const Vectors& input, float* out) const {
    const MatrixView& shape = matrices.first;
    const int64_t expert = routed_[first].expert;
    const T* weight = static_cast<const T*>(shape.weight) + expert * matrices.step;
    const T* bias = shape.bias ? static_cast<const T*>(shape.bias) + expert * shape.rows : nullptr;
    out += first * shape.rows;
    const auto rows = [&](int64_t begin, int64_t end) {
      if (matrices.by_input)
        gemv_by_input(weight, shape.stride, bias, begin, end, shape.columns, input, out, shape.rows);
      else
        gemv(weight, shape.stride, bias, begin, end, shape.columns, input, out, shape.rows);
    };
    if (&matrices == &experts_.down) {
      const Share own = t_.share(shape);
      return rows(own.begin, own.end);
    }
    const Share own = t_.share(inner_);
    if (experts_.in_turn) return rows(2 * own.begin, 2 * own.end);
    rows(own.begin, own.end);
    rows(inner_ + own.begin, inner_ + own.end);
  }

  void unit(int64_t slot, const Share& own) const {
    const float* gate_up = t_.scratch.gate_up + slot * 2 * inner_;
    float* out = t_.scratch.activated + slot * inner_;
    if (!experts_.in_turn)
      return t_.gated(out + own.begin, gate_up + own.begin, gate_up + inner_ + own.begin, own.end - own.begin);
    constexpr int64_t kBlock = 64;
    float gate[kBlock], up[kBlock];
    for (int64_t begin = own.begin; begin < own.end; begin += kBlock) {
      const int64_t end = std::min(own.end, begin + kBlock);
      for (int64_t i = begin; i < end; ++i) {
        gate[i - begin] = gate_up[2 * i];
        up[i - begin] = gate_up[2 * i + 1];
      }
      t_.gated(out + begin, gate, up, end - begin);
    }
  }

  const StepThread<T>& t_;
  const ExpertsView& experts_;
  Routed* const routed_;
  const int64_t count_;  // of slots
  const int64_t inner_;
};

}  // namespace e3::E3_ISA_NAMESPACE
