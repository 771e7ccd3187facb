// The kernels behind torch.ops.e3.*, compiled once an instruction set; one table of them is chosen at load.
#pragma once

#include "kernels/problem.h"
#include "simd/isa.h"
#include "simd/parallel.h"

namespace e3 {

struct OpsTable {
  Isa isa;
  void (*entropy_kl)(const EntropyKl&, const Parallel&, const LossOutput&);
  void (*entropy_kl_backward)(const EntropyKl&, const Parallel&, const float* grad_loss, bool stream, void* grad);
  void (*topk_kl)(const TopkKl&, const Parallel&, const LossOutput&);
  void (*topk_kl_backward)(const TopkKl&, const Parallel&, const float* grad_loss, bool stream, void* grad);
  void (*gumbel_topk)(const GumbelTopk&, const Parallel&, void* mask, void* probs);
  void (*gumbel_topk_backward)(const GumbelTopk&, const GumbelIncoming&, const Parallel&, void* grad_logits);
  void (*gated_residual)(const GatedResidual&, const Parallel&, bool stream, void* out);
  void (*gated_residual_backward)(const GatedResidual&, const void* grad, const Parallel&, bool stream,
                                  void* grad_hidden, void* grad_branch, float* grad_gate);
  bool (*has_linear)(DType);  // whether the two that follow serve this dtype
  void (*linear_logits)(const LinearLogits&, const Parallel&);
  void (*linear_grad_hidden)(const LinearGradHidden&, const Parallel&);
};

// Defined by ops_table.cpp, in one object an instruction set.
namespace baseline {
extern const OpsTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const OpsTable table;
}
namespace avx512 {
extern const OpsTable table;
}
namespace avx512_bf16 {
extern const OpsTable table;
}
namespace amx {
extern const OpsTable table;
}
#endif

// The table of `isa`, or null where this build does not hold it.
inline const OpsTable* table_of(Isa isa) {
  switch (isa) {
    case Isa::baseline: return &baseline::table;
#if defined(__x86_64__)
    case Isa::avx2: return &avx2::table;
    case Isa::avx512: return &avx512::table;
    case Isa::avx512_bf16: return &avx512_bf16::table;
    case Isa::amx: return &amx::table;
#endif
    default: return nullptr;
  }
}

inline const OpsTable& choose_table() { return *table_of(wanted_isa()); }

}  // namespace e3
