// The events that a sparse teacher's divergence is over: a stored id each, and with a bucket all others together.
#pragma once

#include <cmath>

#include "kernels/token_rows.h"

namespace e3::E3_ISA_NAMESPACE {

struct EventTerm {
  double value;
  double slope;  // ∂value/∂log q, up to a multiple of q that the softmax's gradient cancels
};

inline double log_add(double a, double b) {
  const double high = a > b ? a : b;
  return std::isinf(high) ? high : high + std::log1p(std::exp(-std::fabs(a - b)));
}

// `share`: α of the adaptive divergence.
inline EventTerm event_term(Divergence divergence, double beta, double share, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q);
  if (divergence == Divergence::jsd) {
    const double log_m = log_add(log_p + std::log(beta), log_q + std::log1p(-beta));
    const double of_q = (1.0 - beta) * term(q, log_q - log_m);
    return {beta * term(p, log_p - log_m) + of_q, of_q};
  }
  const double forward = term(p, log_p - log_q), reverse = term(q, log_q - log_p);
  if (divergence == Divergence::forward) return {forward, -p};
  if (divergence == Divergence::reverse) return {reverse, reverse};
  const double weighted = term(1.0 - share, reverse);
  return {term(share, forward) + weighted, weighted - share * p};
}

// log Σ e^{T·x} over all ids as T·m + log_sum, apart: beside an m of 1e38 their sum has no room for log_sum.
struct Normaliser {
  double m;
  double log_sum;
  double temperature;
  double log_share(double x) const { return temperature * (x - m) - log_sum; }
};

}  // namespace e3::E3_ISA_NAMESPACE
