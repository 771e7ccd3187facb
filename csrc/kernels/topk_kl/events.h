// The events that a sparse teacher's divergence is over: a stored id each, and with a bucket all others together.
#pragma once

#include <cmath>

#include "kernels/problem.h"

namespace e3::E3_ISA_NAMESPACE {

struct EventTerm {
  double value;
  double slope;  // ∂value/∂log q, up to a multiple of q that the softmax's gradient cancels
};

// 0·(±∞) counts as 0.
inline double expectation(double p, double value) { return p == 0.0 ? 0.0 : p * value; }

inline double log_add(double a, double b) {
  const double high = a > b ? a : b;
  return std::isinf(high) ? high : high + std::log1p(std::exp(-std::fabs(a - b)));
}

inline EventTerm event_term(Divergence divergence, double beta, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q);
  if (divergence == Divergence::forward) return {expectation(p, log_p - log_q), -p};
  if (divergence == Divergence::reverse) {
    const double term = expectation(q, log_q - log_p);
    return {term, term};
  }
  const double log_m = log_add(log_p + std::log(beta), log_q + std::log1p(-beta));
  const double term = (1.0 - beta) * expectation(q, log_q - log_m);
  return {beta * expectation(p, log_p - log_m) + term, term};
}

// log Σ e^{T·x} over all ids as T·m + log_sum, apart: beside an m of 1e38 their sum has no room for log_sum.
struct Normaliser {
  double m;
  double log_sum;
  double temperature;
  double log_share(double x) const { return temperature * (x - m) - log_sum; }
};

}  // namespace e3::E3_ISA_NAMESPACE
