// The cost of the dispatcher itself: one operator that returns its argument, on the same stable ABI as ours.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

static torch::stable::Tensor empty(torch::stable::Tensor tensor) { return tensor; }

STABLE_TORCH_LIBRARY(e3_bench, m) { m.def("empty(Tensor tensor) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(e3_bench, CPU, m) { m.impl("empty", TORCH_BOX(&empty)); }
