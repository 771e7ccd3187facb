#include "decode/runtime_table.h"

#include "decode/largest.h"
#include "decode/step/step.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
static void run_step(const StepView& step, SpinBarrier& barrier, int thread, int threads) {
  decode(StepThread<T>(step, barrier, thread, threads));
}

static int64_t scratch_size(const StepView& step, int threads) { return StepScratch(step, threads, nullptr).size; }

const RuntimeTable runtime_table{Isa::E3_ISA_NAMESPACE, scratch_size,   run_step<float>,
                                 run_step<bf16>,        run_step<fp16>, largest};

}  // namespace e3::E3_ISA_NAMESPACE
