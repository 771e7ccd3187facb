#include "kernels/runtime_table.h"

#include "kernels/decode_step.h"

namespace e3::E3_ISA_NAMESPACE {

template <class T>
static void run_step(const StepView& step, SpinBarrier& barrier, int thread, int threads) {
  StepThread<T>(step, barrier, thread, threads).run();
}

const RuntimeTable runtime_table{Isa::E3_ISA_NAMESPACE, run_step<float>, run_step<bf16>, run_step<fp16>};

}  // namespace e3::E3_ISA_NAMESPACE
