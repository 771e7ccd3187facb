// torch.ops.e3.*: the kernels of this folder on torch's stable ABI.

#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels/ops_table.h"

namespace {

const e3::OpsTable& kernels() {
  static const e3::OpsTable& table = e3::choose_table();
  return table;
}

std::string native_isa() { return e3::kIsaNames[static_cast<int>(kernels().isa)]; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(e3, m) { m.def("native_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(e3, CompositeExplicitAutograd, m) { m.impl("native_isa", TORCH_BOX(&native_isa)); }
