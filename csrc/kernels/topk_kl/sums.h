// Sums over the ids that are not stored, and how sums of blocks join.
//
// They are relative to a reference of their own, since 1 − Σq cancels when little is left and a peak among the stored
// ids would leave nothing of it; the stored ids join in fp64.
#pragma once

#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

// Sums of E over the ids that are not stored, relative to a reference.
struct TopkSums {
  double reference = -INFINITY;
  double rest = 0;
  double label_sum = 0;  // Σ e^{T·(x−m)}
  bool plain = true;
};

inline void join(TopkSums& total, TopkSums part, double temperature) {
  if (total.reference != part.reference) {
    const double reference = std::fmax(total.reference, part.reference);
    for (TopkSums* sums : {&total, &part}) {
      const double by = sums->rest == 0 ? 0.0 : sums->reference - reference;
      sums->rest *= std::exp(by);
      sums->label_sum *= std::exp(temperature * by);
      sums->reference = reference;
    }
  }
  total.rest += part.rest;
  total.label_sum += part.label_sum;
  total.plain &= part.plain;
}

// Σ E; the terms are kept in `kept`.
template <class T, class Exponential>
float sum_exponentials(const T* x, int count, const Exponential& exponential, float* kept, Prefetch ahead) {
  Vf sum[2] = {};
  for (int i = 0; i < count; i += kStep) {
    ahead.step();
    for (int chain = 0; chain < 2; ++chain) {
      const int at = i + chain * kLanes;
      const Vf e = exponential(load(x + at));
      store(kept + at, e);
      sum[chain] += e;
    }
  }
  return horizontal_sum(sum[0] + sum[1]);
}

// g = or += slope·e^{T·(x−m)}.
inline void exponential_gradient(const float* x, int count, const Rounded& reference, float temperature, float slope,
                                 bool add, float* g) {
  slope *= reference.factor(temperature);
  for (int i = 0; i < count; i += kLanes) {
    const Vf term = exp((load(x + i) - reference.value) * temperature) * slope;
    store(g + i, add ? load(g + i) + term : term);
  }
}

}  // namespace e3::E3_ISA_NAMESPACE
