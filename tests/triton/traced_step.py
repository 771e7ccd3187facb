"""A training step and its CUDA launches traced without a GPU; run by test_triton_compiled.py in a process of its own.

PyTorch without CUDA has no autograd engine for CUDA tensors, not even fake ones, so the step with its gradient is
traced for CPU tensors (nothing is launched), and for CUDA tensors the operators that it calls, backward ones included.
Arguments: cpu or cuda, and for the latter the built cuda_guard.cpp where PyTorch has no CUDA.
Prints a line each: number of graphs, forward nodes, and with the gradient, backward nodes, else the CPU's tensors.
"""

import sys

import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode

import e3kernels as e3k
import e3kernels.triton
from e3kernels import backends
from e3kernels.ops.common.arguments import scalar_tensor


def step(student, teacher, labels, theta, hidden, branch, temperature, tau):
    sample = e3k.gumbel_topk(theta, 3, tau=tau, seed=1, step=2)
    out = e3k.gated_residual(hidden, branch, sample.mask[0])
    dense = e3k.entropy_kl(2 * student, teacher, labels, temperature=temperature, kd_ratio=0.5)
    stored, ids = teacher.log_softmax(-1).topk(4)
    sparse = e3k.topk_kl(3 * student, stored, ids, labels, temperature=temperature)
    linear = e3k.linear_entropy_kl(out, student[:, :64], branch, teacher[:, :64], temperature=temperature)
    return dense + sparse + linear


def launches(student, teacher, labels, theta, hidden, branch, temperature, tau):
    loss = step(student, teacher, labels, theta, hidden, branch, temperature, tau)
    scalars = scalar_tensor((temperature, 1.0, 0.5, 0.5, 0.0, 1.0, 0.0, 1.0), student.device)
    grad = torch.ops.e3.entropy_kl_backward.triton(labels.float(), student, teacher, labels, None, scalars, 1, 0, -100)
    return loss, grad, torch.ops.e3.gated_residual_backward.triton(hidden, hidden, branch, theta[0])


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


def on_cpu(graph: torch.fx.GraphModule) -> list[str]:
    """The computed nodes whose value is a tensor on the CPU."""
    computed = [node for node in graph.graph.nodes if node.op != "placeholder"]
    return [node.name for node in computed if getattr(node.meta.get("val"), "device", None) == torch.device("cpu")]


def trace(function, device: str, gradient: bool) -> AotEagerAndRecordGraphs:
    """Four steps, each with other scalars and another number of tokens."""
    record = AotEagerAndRecordGraphs()
    compiled = torch.compile(function, backend=record, fullgraph=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device), e3k.use_backend("triton"):
        theta, hidden = (torch.randn(shape).requires_grad_(gradient) for shape in ((6,), (2, 3, 64)))
        branch = torch.randn(2, 3, 64)
        for i in range(4):
            student, teacher = torch.randn(8 + 8 * i, 512).requires_grad_(gradient), torch.randn(8 + 8 * i, 512)
            labels = torch.zeros(8 + 8 * i, dtype=torch.long)
            result = compiled(student, teacher, labels, theta, hidden, branch, 1.0 + i / 3, 0.5 + i / 7)
            if gradient:
                result.backward()
    return record


def main() -> None:
    device, *guards = sys.argv[1:]
    for guard in guards:
        torch.ops.load_library(guard)
    e3kernels.triton.load(backends.register, ("cpu", "cuda"), backends.FLOATS)
    record = trace(step, "cpu", gradient=True) if device == "cpu" else trace(launches, "cuda", gradient=False)
    print(len(record.graphs))
    print(*kernels(record.fw_graphs[-1]))
    if device == "cuda":
        print("CPU tensors:", *on_cpu(record.fw_graphs[-1]))
    if device == "cpu":
        print(*kernels(record.bw_graphs[-1]))


if __name__ == "__main__":
    main()
