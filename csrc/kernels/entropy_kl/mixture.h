// The mixture μ = βp + (1−β)q that the jsd compares both models with: a sweep of its own, since μ needs both Z.
//
// A normaliser travels as (m, log Z): beside an m of 1e38 their sum has no room for log Z.
#pragma once

#include "simd/block.h"

namespace e3::E3_ISA_NAMESPACE {

struct JsdSums {
  double teacher = 0;  // Σ p·(log p − log μ)
  double student = 0;  // Σ q·(log q − log μ)
};

// The logarithm of Σ e^x: m + log_sum.
struct LogNorm {
  float m;
  float log_sum;
};

inline LogNorm log_norm(double reference, double sum) {
  const float m = static_cast<float>(reference);
  return {m, static_cast<float>(reference - m + std::log(sum))};
}

// Where the two models stand in the mixture: the normalisers of both, and β and 1 − β, each rounded once.
struct Mixing {
  LogNorm student, teacher;
  float beta, rest;
};

// log p, log q and log μ of one vector; −∞ is held finite so that 0·log 0 = 0.
struct Mixture {
  Vf log_p, log_q, p, q, log_mu;
  Mixture(Vf xs, Vf xt, const Mixing& by)
      : log_p(max(broadcast(kLowest), (xt - by.teacher.m) - by.teacher.log_sum)),
        log_q(max(broadcast(kLowest), (xs - by.student.m) - by.student.log_sum)),
        p(exp(log_p)),
        q(exp(log_q)),
        log_mu(log(fma(broadcast(by.beta), p, by.rest * q))) {}
};

inline JsdSums sum_mixture(const float* xs, const float* xt, int count, const Mixing& by) {
  Vf teacher{}, student{};
  for (int i = 0; i < count; i += kLanes) {
    const Mixture m(load(xs + i), load(xt + i), by);
    teacher = fma(m.p, m.log_p - m.log_mu, teacher);
    student = fma(m.q, m.log_q - m.log_mu, student);
  }
  return {horizontal_sum(teacher), horizontal_sum(student)};
}

}  // namespace e3::E3_ISA_NAMESPACE
