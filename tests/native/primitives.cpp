// The building blocks of csrc/simd, the noise and the largest logit behind a C interface, for test_primitives.py.
#include "decode/largest.h"
#include "kernels/philox.h"
#include "simd/block.h"

using namespace e3;
using namespace e3::E3_ISA_NAMESPACE;

namespace {

template <class Function>
void map(const float* x, int64_t count, float* out, const Function& function) {
  for (int64_t i = 0; i < count; i += kLanes) store(out + i, function(load(x + i)));
}

}  // namespace

extern "C" {

int lanes() { return kLanes; }

void exp_of(const float* x, int64_t count, float* out) {
  map(x, count, out, [](Vf v) { return exp(v); });
}
void log_of(const float* x, int64_t count, float* out) {
  map(x, count, out, [](Vf v) { return log(v); });
}
void tanh_of(const float* x, int64_t count, float* out) {
  map(x, count, out, [](Vf v) { return tanh(v); });
}

void widen(const uint16_t* x, int64_t count, int dtype, float* out) {
  with_dtype(static_cast<DType>(dtype), [&](auto element) {
    using T = decltype(element);
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load(reinterpret_cast<const T*>(x) + i));
  });
}

void narrow_to(const float* x, int64_t count, int dtype, bool stream_out, void* out) {
  store_block(x, static_cast<int>(count), static_cast<DType>(dtype), stream_out, out, 0);
  stream_fence();
}

int64_t largest_of(const float* x, int64_t count, bool* nan) {
  const Largest found = largest(x, count);
  *nan = found.nan;
  return found.value == x[found.index] ? found.index : -1;
}

void noise(uint64_t seed, uint64_t step, uint32_t row, int64_t columns, double* out) {
  gumbel_noise(seed, step, row, columns, out);
}
}
