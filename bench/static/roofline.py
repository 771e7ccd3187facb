"""Roofline estimates from datasheet figures. ESTIMATES: nothing here was measured by us.

No overlap is assumed: matrix products at the peak rate and passes over logits at the peak bandwidth are added.
"""

from typing import Any, NamedTuple


class Gpu(NamedTuple):
    """Datasheet: dense bf16 matrix rate in TFLOP/s and memory bandwidth in TB/s."""

    tflops: float
    bandwidth: float


GPUS = {
    "A100-SXM-80GB": Gpu(312, 2.039),
    "H100-SXM": Gpu(989, 3.35),
    "H200-SXM": Gpu(989, 4.8),
    "B200": Gpu(2250, 8.0),
    "MI300X": Gpu(1307, 5.3),
}
# (tokens, hidden, vocabulary)
SHAPES = {
    "SmolLM2-135M": (4096, 576, 49152),
    "Llama-3-8B": (8192, 4096, 128256),
    "Qwen3-32B": (8192, 5120, 151936),
}
BF16, FP32 = 2, 4
# Passes over one model's logits in memory. Split path: both models for the statistics, both for the gradient, and the
# gradient written. One-kernel path: the second read of a row that fits the L2 cache costs no memory traffic.
SPLIT_PASSES, ROW_PASSES = 5, 3
LIGER_A100_MS, LIGER_A100_GB = 129.0, 2.0


def _milliseconds(gpu: Gpu, flops: float, moved: float) -> float:
    return 1e3 * (flops / (gpu.tflops * 1e12) + moved / (gpu.bandwidth * 1e12))


def _product(tokens: int, hidden: int, vocabulary: int) -> float:
    return 2.0 * tokens * hidden * vocabulary


def _linear(gpu: Gpu, shape: tuple[int, int, int], products: int, passes: int) -> float:
    """`products` matrix products of the shape, and `passes` over bf16 logits in memory."""
    tokens, _, vocabulary = shape
    return _milliseconds(gpu, products * _product(*shape), passes * BF16 * tokens * vocabulary)


def liger_comparison() -> dict[str, Any]:
    """Ours by the arithmetic that explains Liger's published fused-linear KL on an A100 (8192 x 4096 x 128256, bf16).

    Theirs: logits, dX, dW (3 products); logits written once by the product, read 3 times and overwritten once by the
    kernel, read twice as a gradient by the products (7 passes), the given target read twice (2 passes). The share of
    that roofline which the published time reaches is then applied to ours: one product more (the teacher's logits,
    which Liger is given as probabilities), logits of both models written once (2), `entropy_kl_row` from memory (5),
    the gradient read twice (2).
    """
    gpu, shape = GPUS["A100-SXM-80GB"], SHAPES["Llama-3-8B"]
    theirs = _linear(gpu, shape, 3, 9)
    share = theirs / LIGER_A100_MS
    tokens, hidden, vocabulary = shape
    weight, tile = vocabulary * hidden, 64 << 20
    return {
        "assumptions": liger_comparison.__doc__,
        "liger_published_ms": LIGER_A100_MS,
        "liger_published_gb": LIGER_A100_GB,
        "liger_roofline_ms": theirs,
        "share_of_roofline": share,
        "ours_ms": _linear(gpu, shape, 4, 9) / share,
        "ours_frozen_head_ms": _linear(gpu, shape, 3, 8) / share,
        "ours_gb": (FP32 * weight + 2 * BF16 * tile + BF16 * tokens * hidden) / 1e9,
        "ours_frozen_head_gb": (2 * BF16 * tile + BF16 * tokens * hidden) / 1e9,
    }


def estimates() -> dict[str, Any]:
    """Milliseconds by GPU and shape, bf16, forward and backward."""
    table: dict[str, Any] = {}
    for name, gpu in GPUS.items():
        for label, shape in SHAPES.items():
            elements = float(shape[0] * shape[2])
            table.setdefault(name, {})[label] = {
                "entropy_kl_split_ms": _milliseconds(gpu, 0, SPLIT_PASSES * BF16 * elements),
                "entropy_kl_row_in_l2_ms": _milliseconds(gpu, 0, ROW_PASSES * BF16 * elements),
                "linear_entropy_kl_ms": _linear(gpu, shape, 4, 9),
                "linear_entropy_kl_frozen_head_ms": _linear(gpu, shape, 3, 8),
                "linear_entropy_kl_on_chip_forward_ms": _linear(gpu, shape, 2, 0),
            }
    return {"what": "ESTIMATE from datasheet figures, not a measurement", "gpus": table, "liger": liger_comparison()}
