#include "kernels/ops_table.h"

#include "kernels/entropy_kl.h"

namespace e3::E3_ISA_NAMESPACE {

const OpsTable table{
    .isa = Isa::E3_ISA_NAMESPACE,
    .entropy_kl = entropy_kl,
    .entropy_kl_backward = entropy_kl_backward,
};

}  // namespace e3::E3_ISA_NAMESPACE
