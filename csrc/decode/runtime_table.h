// What the runtime calls of this folder: one thread's part of a decoding step, for each storage type. Compiled once for
// every instruction set.
#pragma once

#include "decode/decoder_view.h"
#include "decode/spin_barrier.h"
#include "simd/isa.h"

namespace e3 {

using StepFunction = void (*)(const StepView& step, SpinBarrier& barrier, int thread, int threads);

struct RuntimeTable {
  Isa isa;
  std::int64_t (*scratch_size)(const StepView& step, int threads);  // floats that StepView::scratch points at
  StepFunction step_fp32, step_bf16, step_fp16;
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

}  // namespace e3
