"""Roofline estimates from datasheet figures. ESTIMATES: nothing here was measured by us.

No overlap of kernels is assumed: matrix products at the peak rate and passes over logits are added. A pass takes what
is longer, its bytes at the peak bandwidth or its instructions, counted in our binaries for sm_90, at the peak rate.
"""

from typing import Any, NamedTuple

from e3kernels.triton.on_chip import TILE_LOGITS


class Gpu(NamedTuple):
    """Datasheet: dense bf16 matrix rate in TFLOP/s, memory bandwidth in TB/s, L2 cache in MB, multiprocessors, and
    their clock in GHz under load; each issues an instruction of 128 threads per cycle."""

    tflops: float
    bandwidth: float
    l2: float
    processors: int
    clock: float

    def issue_ms(self, instructions: float) -> float:
        """The time of so many instructions of a thread."""
        return 1e3 * instructions / (128 * self.processors * self.clock * 1e9)


GPUS = {
    "A100-SXM-80GB": Gpu(312, 2.039, 40, 108, 1.41),
    "H100-SXM": Gpu(989, 3.35, 50, 132, 1.755),
    "H200-SXM": Gpu(989, 4.8, 50, 132, 1.755),
    "B200": Gpu(2250, 8.0, 126, 148, 1.85),
    "MI300X": Gpu(1307, 5.3, 32, 304, 2.1),
}
# (tokens, hidden, vocabulary)
SHAPES = {
    "SmolLM2-135M": (4096, 576, 49152),
    "Llama-3-8B": (8192, 4096, 128256),
    "Qwen3-32B": (8192, 5120, 151936),
    "Gemma-2-2B": (8192, 2304, 256000),
}
BF16, FP32 = 2, 4
# Passes over one model's logits: both models for the statistics, both for the gradient, the gradient written.
PASSES = 5
RESIDENT_ROWS = 4  # programs of entropy_kl_row on a multiprocessor: 8 warps each, at the recorded occupancy of a half
LIGER_A100_MS, LIGER_A100_GB = 129.0, 2.0
CCE_A100_MS, CCE_A100_GB = 134.8, 1.164  # of its README: loss and gradient, Gemma 2


def _milliseconds(gpu: Gpu, flops: float, moved: float) -> float:
    return 1e3 * (flops / (gpu.tflops * 1e12) + moved / (gpu.bandwidth * 1e12))


def _row_passes(gpu: Gpu, vocabulary: int) -> int:
    """Passes that one kernel a row takes: its second reads come from L2 where all rows in flight fit there."""
    in_flight = gpu.processors * RESIDENT_ROWS * 2 * BF16 * vocabulary
    return PASSES - 2 if in_flight <= gpu.l2 * 1e6 else PASSES


def _product(tokens: int, hidden: int, vocabulary: int) -> float:
    return 2.0 * tokens * hidden * vocabulary


def _linear(gpu: Gpu, shape: tuple[int, int, int], products: int, passes: int) -> float:
    """`products` matrix products of the shape, and `passes` over bf16 logits in memory."""
    tokens, _, vocabulary = shape
    return _milliseconds(gpu, products * _product(*shape), passes * BF16 * tokens * vocabulary)


def liger_comparison() -> dict[str, Any]:
    """Ours by the arithmetic that explains Liger's published fused-linear KL on an A100 (8192 x 4096 x 128256, bf16).

    Their time is explained as: 3 products (logits, dX, dW); logits written once by the product, read 3 times and
    overwritten once by the kernel (its binary: 12 bytes a logit with the target's 2 reads), read twice as a gradient by
    the products: 9 passes of 2 bytes a logit. The share of that roofline which the published time reaches is applied to
    ours: one product more, because Liger is given the teacher's probabilities (2.1 GB more that its figure may leave
    out) and we make the teacher's logits from its hidden states; logits of both models written once (2 passes),
    entropy_kl_row from memory (5), the gradient read twice (2). Frozen head: no dW product and one read less. Memory:
    dW in fp32, one tile of logits of each model, dX.
    """
    gpu, shape = GPUS["A100-SXM-80GB"], SHAPES["Llama-3-8B"]
    theirs = _linear(gpu, shape, 3, 9)
    share = theirs / LIGER_A100_MS
    tokens, hidden, vocabulary = shape
    weight, tile = vocabulary * hidden, TILE_LOGITS
    return {
        "assumptions": " ".join((liger_comparison.__doc__ or "").split()),
        "liger_published_ms": LIGER_A100_MS,
        "liger_published_gb": LIGER_A100_GB,
        "liger_roofline_ms": theirs,
        "share_of_roofline": share,
        "ours_ms": _linear(gpu, shape, 4, 9) / share,
        "ours_frozen_head_ms": _linear(gpu, shape, 3, 8) / share,
        "ours_gb": (FP32 * weight + 2 * BF16 * tile + BF16 * tokens * hidden) / 1e9,
        "ours_frozen_head_gb": (2 * BF16 * tile + BF16 * tokens * hidden) / 1e9,
    }


def cce_comparison() -> dict[str, Any]:
    """Ours at the shape at which Cut Cross Entropy publishes, Gemma 2 on an A100 (8192 x 2304 x 256000, bf16).

    A cross-entropy has no teacher: of the 3 products that theirs needs (logits, dX, dW) it makes the first twice, skips
    what is negligible of the other two, and no logit is in memory. The share of 3 products at the peak rate which the
    published time reaches is not applied to ours: ours is the bare roofline, with one product more for the teacher.
    """
    gpu, shape = GPUS["A100-SXM-80GB"], SHAPES["Gemma-2-2B"]
    return {
        "assumptions": " ".join((cce_comparison.__doc__ or "").split()),
        "cce_published_ms": CCE_A100_MS,
        "cce_published_gb": CCE_A100_GB,
        "cce_share_of_3_products": _milliseconds(gpu, 3 * _product(*shape), 0) / CCE_A100_MS,
        "ours_roofline_ms": _linear(gpu, shape, 4, 9),
        "ours_frozen_head_roofline_ms": _linear(gpu, shape, 3, 8),
    }


def estimates(statistics: float, gradient: float) -> dict[str, Any]:
    """Milliseconds by GPU and shape, bf16, forward and backward; the arguments are the instructions per logit of the
    two sweeps of `entropy_kl`."""
    table: dict[str, Any] = {}
    for name, gpu in GPUS.items():
        for label, shape in SHAPES.items():
            elements = float(shape[0] * shape[2])
            issue = gpu.issue_ms(statistics * elements), gpu.issue_ms(gradient * elements)
            memory = (_milliseconds(gpu, 0, passes * BF16 * elements) for passes in (2, 3))
            one = _milliseconds(gpu, 0, _row_passes(gpu, shape[2]) * BF16 * elements)
            table.setdefault(name, {})[label] = {
                "entropy_kl_ms": sum(map(max, memory, issue)),
                "entropy_kl_issue_ms": sum(issue),
                "entropy_kl_one_kernel_ms": max(one, sum(issue)),
                "linear_entropy_kl_ms": _linear(gpu, shape, 4, 9),
                "linear_entropy_kl_frozen_head_ms": _linear(gpu, shape, 3, 8),
                "linear_entropy_kl_on_chip_forward_ms": _linear(gpu, shape, 2, 0),
            }
    return {
        "what": "ESTIMATE from datasheet figures, not a measurement",
        "gpus": table,
        "liger": liger_comparison(),
        "cce": cce_comparison(),
    }
