"""What the machine can do at most: the fastest of several kernels, on memory like that of what is held against it."""

import pytest
import torch

from e3kernels.backends import native_isa
from e3pruner.profiling.ceilings import Probe, ceilings_of, copies, fastest, products
from e3pruner.timing import Timed


def test_a_ceiling_is_the_fastest_kernel_of_those_tried():
    """One torch.mm was the ceiling, and our own product reached 1.6 times as much."""
    tried = {("matrix product float32", name): Probe(100.0, lambda: 0.0) for name in ("1024²", "head", "head, ours")}
    seconds = dict(zip(tried, ([2.0, 2.0, 2.1], [4.0, 4.0, 4.1], [1.25, 1.25, 9.0]), strict=True))
    rate, estimate = fastest(tried, seconds, "matrix product float32")
    assert (rate, estimate.value, estimate.rounds) == (80.0, 1.25, 3)
    every = tried | {(name, "any"): Probe(8.0, lambda: 0.0) for name in ("read", "copy", "dispatch")}
    found = ceilings_of(every, seconds | {key: [1.0, 1.0, 1.0] for key in every if key not in seconds})
    assert (found.gemm, found.read, found.dispatch) == ({"float32": 80.0}, 8.0, 1 / 8)


def test_our_own_product_is_among_those_tried(monkeypatch):
    monkeypatch.setattr("e3pruner.profiling.ceilings._SQUARES", (8,))
    monkeypatch.setattr("e3pruner.profiling.ceilings._WIDE", (4, 8, 16))
    names = {kernel for _, kernel in products(torch.device("cpu"), torch.float32)}
    assert names == {"8²", "head"} | ({"head, ours"} if native_isa() else set())


def test_a_copy_is_of_as_many_bytes_as_are_asked_for():
    """What fits into a cache is held against a copy that does."""
    source = torch.ones(64)
    for probe in copies(source, None).values():
        assert probe.work == 2 * source.nbytes
        assert isinstance(probe.seconds, Timed)  # which takes the harness's own time off


@pytest.mark.parametrize("work", [1.0, 64.0])
def test_a_rate_is_work_over_time(work):
    rate, _ = fastest({("read", "sum"): Probe(work, lambda: 0.0)}, {("read", "sum"): [2.0]}, "read")
    assert rate == work / 2
