import os
import subprocess
import sys
import threading

import pytest
import torch

import e3kernels as e3k
from e3kernels import backends, native
from e3kernels.contract import BACKENDS
from e3kernels.registration import OPERATORS

OPERATIONS = (
    "entropy_kl",
    "gated_residual",
    "gumbel_topk",
    "linear_entropy_kl",
    "linear_topk_kl",
    "topk_kl",
)


def test_every_operation_has_a_reference_for_every_dtype():
    assert sorted(OPERATORS) == list(OPERATIONS)
    for operation in OPERATIONS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            with e3k.use_backend("reference"):
                assert backends.resolve(operation, "cpu", dtype) == "reference"


def test_use_backend_nests_and_ends():
    outside = backends.requested()
    with e3k.use_backend("native"):
        with e3k.use_backend("reference"):
            assert backends.requested() == "reference"
        assert backends.requested() == "native"
        with pytest.raises(ZeroDivisionError), e3k.use_backend("reference"):
            raise ZeroDivisionError
        assert backends.requested() == "native"
    assert backends.requested() == outside


def test_unknown_backend_lists_the_choices():
    with pytest.raises(ValueError, match="'cuda'; choose one of reference, native, triton"), e3k.use_backend("cuda"):
        pass


def test_use_backend_is_the_threads_own():
    seen = []
    entered, leave = threading.Event(), threading.Event()

    def other():
        with e3k.use_backend("native"):
            entered.set()
            leave.wait(10)
            seen.append(backends.requested())

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    with e3k.use_backend("reference"):
        leave.set()
        thread.join()
        assert backends.requested() == "reference"
    assert seen == ["native"]


def test_asked_for_backend_that_cannot_serve_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(
        backends, "services", {("reference", "entropy_kl"): backends.services["reference", "entropy_kl"]}
    )
    monkeypatch.setattr(backends, "unavailable", {"native": "the moon is full"})
    monkeypatch.setattr(backends, "_choices", {})
    logits = torch.zeros(2, 3)
    with (
        e3k.use_backend("native"),
        pytest.raises(RuntimeError, match="backend 'native' cannot serve entropy_kl: the moon is full"),
    ):
        e3k.entropy_kl(logits, logits)
    assert e3k.entropy_kl(logits, logits) == 0
    assert backends.choose("entropy_kl", "cpu", torch.float32).reason == "native: the moon is full"


def test_choice_by_device_and_dtype(monkeypatch):
    floats = backends.FLOATS
    services = {
        ("native", "entropy_kl"): backends.Service(("cpu",), floats),
        ("triton", "entropy_kl"): backends.Service(("cuda", "xpu"), floats),
        ("reference", "entropy_kl"): backends.Service(None, (*floats, torch.float64)),
    }
    monkeypatch.setattr(backends, "services", services)
    monkeypatch.setattr(backends, "_environment", None)
    monkeypatch.setattr(backends, "_choices", {})

    def choice(device, dtype):
        return backends.choose("entropy_kl", device, dtype)

    assert choice("cpu", torch.bfloat16).backend == "native"
    assert choice("cuda", torch.bfloat16).backend == choice("xpu", torch.float32).backend == "triton"
    assert choice("mps", torch.float32).backend == "reference"
    wide = choice("cpu", torch.float64)
    assert wide.backend == "reference"
    assert "native: serves torch.float32" in wide.reason
    with e3k.use_backend("native"), pytest.raises(RuntimeError, match="serves cpu tensors, not cuda"):
        choice("cuda", torch.float32)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_environment_asks_for_a_process():
    code = "import e3kernels as e3k; print({v['cpu']['backend'] for v in e3k.info()['operations'].values()})"
    assert run(code, E3_BACKEND="reference").stdout.strip() == "{'reference'}"
    failed = run("import torch, e3kernels as e3k; e3k.gumbel_topk(torch.zeros(3), 1)", E3_BACKEND="fast")
    assert "ValueError: E3_BACKEND is 'fast'; choose one of reference, native, triton" in failed.stderr


def test_a_damaged_native_module_leaves_the_reference(tmp_path, monkeypatch):
    (tmp_path / "_ops.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(backends, "unavailable", {})
    backends._load_native()
    assert backends.unavailable["native"].startswith("_ops.abi3.so cannot be loaded: ")


def test_a_native_module_of_other_sources_leaves_the_reference(monkeypatch):
    if "native" in backends.unavailable:
        pytest.skip(backends.unavailable["native"])
    monkeypatch.setattr(backends, "unavailable", {})
    monkeypatch.setitem(native.SCHEMAS, "made_tomorrow", "() -> ()")
    backends._load_native()
    assert "built from other sources" in backends.unavailable["native"]


def test_import_touches_neither_transformers_nor_the_compiler():
    code = (
        "import sys, e3kernels; "
        "print([m for m in ('transformers', 'e3pruner', 'triton', 'torch._dynamo') if m in sys.modules])"
    )
    assert run(code, TRITON_INTERPRET="0").stdout.strip() == "[]"


def test_overloads_exist_for_what_is_served():
    for backend, operation in backends.services:
        assert backend in BACKENDS
        assert hasattr(getattr(torch.ops.e3, operation), backend)
        assert hasattr(getattr(torch.ops.e3, f"{operation}_backward"), backend)


def test_a_traced_loss_has_its_scalars_on_the_device_of_its_logits():
    """A CPU tensor in a graph keeps it from becoming a CUDA graph; the meta device stands for the GPU."""
    graphs = []

    def record(graph, _):
        graphs.append(graph.graph)
        return lambda *_: (torch.empty((), device="meta"),)

    def loss(z, temperature):
        return e3k.entropy_kl(z, z, temperature=temperature, num_items=3)

    for temperature in (1.0, 1.5):
        torch.compile(loss, backend=record, fullgraph=True)(torch.empty(4, 9, device="meta"), temperature)
    computed = [node for graph in graphs for node in graph.nodes if node.op != "placeholder"]  # a float is a CPU input
    values = [node.meta.get("example_value") for node in computed]
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    assert devices == {"meta"}
