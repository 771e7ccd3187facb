#include "kernels/ops_table.h"

namespace e3::E3_ISA_NAMESPACE {

const OpsTable table{
    .isa = Isa::E3_ISA_NAMESPACE,
};

}  // namespace e3::E3_ISA_NAMESPACE
