// How a stored logit is read.
#pragma once

namespace e3 {

// x = f(z)/T of a logit z:  f(z) = c·tanh(scale·z/c) with a soft cap c > 0, scale·z without (c = 0).
struct Transform {
  float scale;
  float softcap;
  float temperature;
};

}  // namespace e3
