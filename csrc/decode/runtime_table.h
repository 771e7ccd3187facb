// What the runtime calls of this folder: one thread's part of a decoding step, for each storage type, and the largest
// of the logits that come out. Compiled once for every instruction set.
#pragma once

#include "decode/decoder_view.h"
#include "decode/spin_barrier.h"
#include "simd/isa.h"

namespace e3 {

using StepFunction = void (*)(const StepView& step, SpinBarrier& barrier, int thread, int threads);

// The largest logit, the lowest index of it, and whether any logit is NaN.
struct Largest {
  int64_t index;
  float value;
  bool nan;
};

struct RuntimeTable {
  Isa isa;
  int64_t (*scratch_size)(const StepView& step, int threads);  // floats that StepView::scratch points at
  StepFunction step_fp32, step_bf16, step_fp16;
  Largest (*largest)(const float* logits, int64_t count);
};

// Defined by runtime_table.cpp, in one object an instruction set.
namespace baseline {
extern const RuntimeTable runtime_table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RuntimeTable runtime_table;
}
namespace avx512 {
extern const RuntimeTable runtime_table;
}
namespace avx512_bf16 {
extern const RuntimeTable runtime_table;
}
namespace amx {
extern const RuntimeTable runtime_table;
}
#endif

inline const RuntimeTable& runtime_table_of(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return avx2::runtime_table;
    case Isa::avx512: return avx512::runtime_table;
    case Isa::avx512_bf16: return avx512_bf16::runtime_table;
    case Isa::amx: return amx::runtime_table;
#endif
    default: return baseline::runtime_table;
  }
}

inline const RuntimeTable& choose_runtime_table() {
  static const RuntimeTable& table = runtime_table_of(wanted_isa());
  return table;
}

}  // namespace e3
