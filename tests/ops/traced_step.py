"""A training step traced for CUDA without a GPU; prints the number of graphs, the forward nodes and the backward nodes.

Run by test_triton_compiled.py in a process of its own.
"""

import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode

import e3kernels as e3k
import e3kernels.triton
from e3kernels import backends


def step(student, teacher, labels, theta, hidden, branch, temperature, tau):
    sample = e3k.gumbel_topk(theta, 3, tau=tau, seed=1, step=2)
    out = e3k.gated_residual(hidden, branch, sample.mask[0])
    dense = e3k.entropy_kl(2 * student, teacher, labels, temperature=temperature, kd_ratio=0.5)
    stored, ids = teacher.log_softmax(-1).topk(4)
    sparse = e3k.topk_kl(3 * student, stored, ids, labels, temperature=temperature)
    return dense + sparse + out.sum()


def kernels(graph: torch.fx.GraphModule) -> list[str]:
    """The nodes that matter: each launch by its kernel's name, each of our operators by its own."""
    names = []
    for node in graph.graph.nodes:
        if "kernel_idx" in node.kwargs:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            names.append(getattr(kernel, "fn", kernel).__name__)
        elif str(node.target).startswith("e3."):
            names.append(str(node.target))
    return names


def main() -> None:
    torch._C._ensureCUDADeviceGuardSet()  # a guard that does nothing, for a PyTorch without CUDA
    if ("triton", "entropy_kl") not in backends.services:
        e3kernels.triton.load(backends.register, ("cuda",), backends.FLOATS)
    record = AotEagerAndRecordGraphs()
    compiled = torch.compile(step, backend=record, fullgraph=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        student, theta, hidden = (torch.randn(shape).requires_grad_() for shape in ((8, 512), (6,), (2, 3, 64)))
        teacher, labels, branch = torch.randn(8, 512), torch.zeros(8, dtype=torch.long), torch.randn(2, 3, 64)
        for i in range(4):
            loss = compiled(student, teacher, labels, theta, hidden, branch, 1.0 + i / 3, 0.5 + i / 7)
            loss.backward()
    print(len(record.graphs))
    print(*kernels(record.fw_graphs[-1]))
    print(*kernels(record.bw_graphs[-1]))


if __name__ == "__main__":
    main()
