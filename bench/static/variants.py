"""The calls whose kernels are compiled: ours at Llama-3's vocabulary, and the peers' nearest on the same rows."""

from collections.abc import Callable
from typing import Any

import torch

from e3kernels.triton import entropy_kl, gated_residual, gumbel_topk, linear_entropy_kl, linear_topk_kl, topk_kl
from e3kernels.triton.statistics import PAIR_FIELDS, STUDENT_FIELDS

ROWS, VOCABULARY, WIDTH, STORED = 4096, 128256, 1024, 10
# Of Llama 2, GPT-2, Qwen2 without and with its padding, Gemma 1 and Gemma 3: of every alignment there is.
VOCABULARIES = (32000, 50257, 151670, 151936, 256000, 262144)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SWEPT = {**DTYPES, "fp16": torch.float16}  # whose pairs are no halves of a word that a shift makes fp32
MEAN, SUM = 1, 2


def _scalars(softcap: float = 0.0) -> torch.Tensor:
    return torch.tensor([2.0, 1.0, 0.9, 0.5, softcap, 1.0, softcap, 1.0], dtype=torch.float64, device="cpu")


def _dense(
    dtype: torch.dtype, divergence: int, reduction: int, labels: bool, softcap: float = 0.0, rows: int = ROWS,
    vocabulary: int = VOCABULARY,
) -> None:  # fmt: skip
    student, teacher = (torch.empty(rows, vocabulary, dtype=dtype) for _ in range(2))
    target = torch.empty(rows, dtype=torch.int64) if labels else None
    codes = (_scalars(softcap), 1, divergence, -100)
    entropy_kl.entropy_kl(student, teacher, target, None, *codes, reduction, None, True)


def _sparse(
    dtype: torch.dtype, tail: int, labels: bool, rows: int = ROWS, vocabulary: int = VOCABULARY, k: int = STORED
) -> None:
    student = torch.empty(rows, vocabulary, dtype=dtype)
    stored = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    target = torch.empty(rows, dtype=torch.int64) if labels else None
    topk_kl.topk_kl(student, *stored, target, None, _scalars()[:6], 1, 0, -100, tail, MEAN, None, True)


def _join() -> None:
    student, stored = torch.empty(ROWS, VOCABULARY), torch.empty(ROWS, STORED)
    dense = entropy_kl.prepared(student, student, None, None, _scalars(), 1, 0, -100)
    entropy_kl.joined(dense, torch.empty(ROWS, 32, PAIR_FIELDS.value))
    sparse = topk_kl.prepared(student, stored, stored.long(), None, None, _scalars()[:6], 1, 0, -100, 0)
    topk_kl.joined(sparse, torch.empty(ROWS, 32, STUDENT_FIELDS.value))


def _linear(dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(ROWS, WIDTH, dtype=dtype), torch.empty(VOCABULARY, WIDTH, dtype=dtype)
    codes = (_scalars(), 1, 0, -100)
    linear_entropy_kl.on_chip_tokens(hidden, weight, None, hidden, weight, None, None, None, *codes)


def _linear_sparse(dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(ROWS, WIDTH, dtype=dtype), torch.empty(VOCABULARY, WIDTH, dtype=dtype)
    stored = torch.empty(ROWS, STORED), torch.empty(ROWS, STORED, dtype=torch.int64)
    linear_topk_kl.on_chip_tokens(hidden, weight, None, *stored, None, None, _scalars()[:6], 1, 0, -100, 0)


def _gumbel(relaxation: int) -> None:
    scalars = torch.tensor([0.5, 1.0], dtype=torch.float64, device="cpu")
    logits = torch.empty(4, 64)
    _, probs = gumbel_topk.gumbel_topk(logits, scalars, 48, 7, 3, relaxation)
    gumbel_topk.gumbel_topk_backward(logits, logits, probs, scalars, 48, 7, 3, relaxation)


def _gated(dtype: torch.dtype, per_sequence: bool) -> None:
    hidden = torch.empty(8, 2048, 4096, dtype=dtype)
    gate = torch.empty(8, 1, 1) if per_sequence else torch.empty(())
    gated_residual.gated_residual(hidden, hidden, gate)
    gated_residual.gated_residual_backward(hidden, hidden, hidden, gate)


def ours() -> dict[str, Callable[[], Any]]:
    """The variants by name: all of them in bf16, the main ones in fp32; fp16 has the shapes of bf16.

    The mean awaits Σw and takes the split path; `row` is the sum, in one kernel.
    """
    bf16 = torch.bfloat16
    calls: dict[str, Callable[[], Any]] = {
        "entropy_kl/bf16/forward/labels": lambda: _dense(bf16, 0, MEAN, True),
        "entropy_kl/bf16/forward/softcap": lambda: _dense(bf16, 0, MEAN, False, 30.0),
        "topk_kl/bf16/bucket/labels": lambda: _sparse(bf16, 0, True),
        "gated_residual/bf16/sequence": lambda: _gated(bf16, True),
        "entropy_kl/bf16/forward/8 rows": lambda: _dense(bf16, 0, MEAN, False, rows=8),
        "entropy_kl/bf16/jsd/8 rows": lambda: _dense(bf16, 2, MEAN, True, rows=8),
        "vocabulary in parts/join": _join,
        "linear_entropy_kl/bf16/on_chip": lambda: _linear(bf16),
        "linear_topk_kl/bf16/on_chip": lambda: _linear_sparse(bf16),
    }
    for code, divergence in enumerate(("reverse", "jsd", "adaptive"), 1):
        calls[f"entropy_kl/bf16/{divergence}"] = lambda c=code: _dense(bf16, c, MEAN, False)
        calls[f"entropy_kl/bf16/{divergence}/row"] = lambda c=code: _dense(bf16, c, SUM, False)
    for code, tail in enumerate(("renorm", "truncated"), 1):
        calls[f"topk_kl/bf16/{tail}"] = lambda c=code: _sparse(bf16, c, False)
    for name, dtype in DTYPES.items():
        calls[f"entropy_kl/{name}/forward"] = lambda d=dtype: _dense(d, 0, MEAN, False)
        calls[f"entropy_kl/{name}/forward/row"] = lambda d=dtype: _dense(d, 0, SUM, False)
        calls[f"topk_kl/{name}/bucket"] = lambda d=dtype: _sparse(d, 0, False)
        calls[f"gated_residual/{name}/scalar"] = lambda d=dtype: _gated(d, False)
    for code, relaxation in enumerate(("threshold", "softmax", "successive")):
        calls[f"gumbel_topk/{relaxation}"] = lambda c=code: _gumbel(c)
    return calls


def launched() -> dict[str, Callable[[], Any]]:
    """What `launch.py` chooses for every vocabulary, few rows and many, and as many stored ids as anybody keeps."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in SWEPT.items():
        for v in VOCABULARIES:
            calls[f"entropy_kl/{name}/{v}"] = lambda d=dtype, v=v: _dense(d, 0, MEAN, True, vocabulary=v)
            calls[f"entropy_kl/{name}/{v}/row"] = lambda d=dtype, v=v: _dense(d, 0, SUM, True, vocabulary=v)
            calls[f"topk_kl/{name}/{v}"] = lambda d=dtype, v=v: _sparse(d, 0, True, vocabulary=v)
    bf16 = torch.bfloat16
    for v in VOCABULARIES:
        calls[f"entropy_kl/bf16/{v}/8 rows"] = lambda v=v: _dense(bf16, 0, MEAN, True, rows=8, vocabulary=v)
        for k in (1, 32, 100, 128):
            calls[f"topk_kl/bf16/{v}/k={k}"] = lambda v=v, k=k: _sparse(bf16, 0, True, 8, v, k)
    for rows in (50, 100, 200, 400):  # of which 16, 8, 4 and 2 parts are joined
        calls[f"entropy_kl/bf16/{rows} rows"] = lambda n=rows: _dense(bf16, 0, MEAN, True, rows=n)
        calls[f"topk_kl/bf16/{rows} rows"] = lambda n=rows: _sparse(bf16, 0, True, rows=n)
    return calls


def _liger(dtype: torch.dtype) -> None:
    from liger_kernel.ops.fused_linear_kl_div import _kl_div_kernel
    from liger_kernel.ops.kl_div import kldiv_backward_triton, kldiv_forward_triton

    x, y = (torch.empty(ROWS, VOCABULARY, dtype=dtype) for _ in range(2))
    loss, label = torch.empty(ROWS), torch.empty(1, dtype=torch.int64)
    kldiv_forward_triton(x, y, log_target=True, reduction="batchmean", eps=1e-10)
    kldiv_backward_triton(y, torch.tensor(2.0, device="cpu"), x, True)
    rows = (x, x.stride(0), y, y.stride(0))
    _kl_div_kernel[(ROWS,)](
        *rows, loss, 1, label, -100, VOCABULARY, 1.0, 1e-10, 1.0, BLOCK_SIZE=32768, HAS_LABEL=False, num_warps=32
    )


def _trl(dtype: torch.dtype) -> None:
    from trl.kernels.chunked_divergence import _backward_kernel, _stats_kernel

    s, t = (torch.empty(ROWS, 32768, dtype=dtype) for _ in range(2))
    n = [torch.empty(ROWS) for _ in range(7)]
    scales = (1.0, 1.0, 1.0, 1.0, 1.0)
    flags = {"S_HAS_SOFTCAP": False, "T_HAS_SOFTCAP": False, "BLOCK_SIZE": 1024}
    _stats_kernel[(ROWS,)](s, s.stride(0), t, t.stride(0), *n, 32768, *scales, **flags)
    _backward_kernel[(ROWS, 32)](s, s.stride(0), t, t.stride(0), *n[:4], 32768, 0.0, *scales, MODE=0, **flags)


def peers() -> dict[str, Callable[[], Any]]:
    """Liger's KL in bf16, with the launch options that it has itself, and TRL's, whose tiles are fp32."""
    return {"liger/bf16": lambda: _liger(torch.bfloat16), "trl/fp32": lambda: _trl(torch.float32)}
