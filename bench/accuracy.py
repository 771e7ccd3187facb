"""Error of every operation against fp64, beside the textbook's in the same dtype -> bench/results/accuracy.md.

python bench/accuracy.py     exits with 1 where ours exceeds the textbook's by more than the tolerance

The truth is the reference backend in fp64 on the same rounded inputs. Errors are the largest of value and gradient,
relative to the largest value there; the tolerance is one rounding to the dtype (e3kernels/textbook.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import e3kernels as e3k
from e3kernels import textbook
from e3kernels.backends import native_isa
from e3pruner.report import describe_environment
from e3pruner.storage import replacing_file

RESULTS = Path(__file__).parent / "results" / "accuracy.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, WIDTH, K = 6, 64, 10


class Case(NamedTuple):
    """An edge: what is done to the logits, how many there are, and the losses' options."""

    name: str
    options: dict[str, Any]
    vocabulary: int = 2_500
    scale: float = 3.0
    offset: float = 0.0
    masked: int = 0  # logits of the teacher and the student that are −∞
    labels: bool = False
    one_valid: bool = False


CASES = (
    Case("plain", {}),
    Case("weighting none", {"weighting": "none"}),
    Case("weighting inverse", {"weighting": "inverse"}),
    Case("weighting mix, labels", {"weighting": "mix"}, labels=True),
    Case("labels, kd_ratio 0.5", {"kd_ratio": 0.5}, labels=True),
    Case("labels, T 2", {"kd_ratio": 0.5, "temperature": 2.0}, labels=True),
    Case("T 4", {"temperature": 4.0}),
    Case("reverse", {"divergence": "reverse"}),
    Case("jsd", {"divergence": "jsd", "beta": 0.3}),
    Case("student softcap 30, scale 0.5", {"student_softcap": 30.0, "student_scale": 0.5}),
    Case("peaked", {}, scale=20.0),
    Case("nearly uniform", {}, scale=1e-2),
    Case("logits near 1000", {}, offset=1000.0),
    Case("vocabulary masked by −∞", {}, masked=700),
    Case("one token valid", {}, labels=True, one_valid=True),
    Case("one logit", {}, vocabulary=1),
    Case("a block and one more", {}, vocabulary=2_049),
    Case("V 151,936", {}, vocabulary=151_936),
)


class Errors(NamedTuple):
    """One line of the table."""

    op: str
    dtype: torch.dtype
    edge: str
    ours: float
    naive: float

    @property
    def holds(self) -> bool:
        return self.ours <= self.naive + textbook.TOLERANCE[self.dtype]


def with_gradient(function: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
    leaf = leaf.detach().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach().double(), gradient.double()


def error(ours: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Largest error of value and gradient; inf where the textbook gives NaN and the truth does not."""
    worst = 0.0
    for value, exact in zip(ours, truth, strict=True):
        difference = (value - exact).abs().max() / (exact.abs().max() + 1e-3)
        worst = max(worst, difference.nan_to_num(nan=torch.inf).item())
    return worst


def dense_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, case.vocabulary)
    student, teacher = (torch.randn(shape, generator=generator) * case.scale + case.offset for _ in range(2))
    for logits in (student, teacher):
        logits[:, case.vocabulary - case.masked :] = -torch.inf
    labels = torch.arange(ROWS) % case.vocabulary if case.labels else None
    if case.one_valid and labels is not None:
        labels[1:] = -100
    return student.to(dtype), teacher.to(dtype), labels


def entropy_kl(case: Case, dtype: torch.dtype) -> Errors:
    student, teacher, labels = dense_inputs(case, dtype)
    truth = with_gradient(lambda z: e3k.entropy_kl(z, teacher.double(), labels, **case.options), student.double())
    ours = with_gradient(lambda z: e3k.entropy_kl(z, teacher, labels, **case.options), student)
    plain = with_gradient(lambda z: textbook.entropy_kl(z, teacher, labels, **case.options), student)
    return Errors("entropy_kl", dtype, case.name, error(ours, truth), error(plain, truth))


def topk_kl(case: Case, dtype: torch.dtype, tail: str) -> Errors:
    student, teacher, labels = dense_inputs(case, dtype)
    stored = teacher.double().div(case.options.get("temperature", 1.0)).log_softmax(-1)
    logprobs, ids = stored.float().topk(min(K, case.vocabulary))
    options = case.options | {"tail": tail}
    truth = with_gradient(lambda z: e3k.topk_kl(z, logprobs, ids, labels, **options), student.double())
    ours = with_gradient(lambda z: e3k.topk_kl(z, logprobs, ids, labels, **options), student)
    plain = with_gradient(lambda z: textbook.topk_kl(z, logprobs, ids, labels, **options), student)
    return Errors(f"topk_kl {tail}", dtype, case.name, error(ours, truth), error(plain, truth))


def linear(case: Case, dtype: torch.dtype) -> Iterator[Errors]:
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    weight, teacher = (torch.randn(case.vocabulary, WIDTH, generator=generator).mul(0.3).to(dtype) for _ in range(2))
    labels = torch.arange(ROWS) % case.vocabulary if case.labels else None
    wide = (weight.double(), other.double(), teacher.double())
    truth = with_gradient(lambda h: e3k.linear_entropy_kl(h, *wide, labels, **case.options), hidden.double())
    ours = with_gradient(lambda h: e3k.linear_entropy_kl(h, weight, other, teacher, labels, **case.options), hidden)
    logits = F.linear(other, teacher)
    plain = with_gradient(lambda h: textbook.entropy_kl(F.linear(h, weight), logits, labels, **case.options), hidden)
    yield Errors("linear_entropy_kl", dtype, case.name, error(ours, truth), error(plain, truth))
    stored = F.linear(*wide[1:]).div(case.options.get("temperature", 1.0)).log_softmax(-1).float()
    sparse = stored.topk(min(K, case.vocabulary))
    truth = with_gradient(lambda h: e3k.linear_topk_kl(h, wide[0], *sparse, labels, **case.options), hidden.double())
    ours = with_gradient(lambda h: e3k.linear_topk_kl(h, weight, *sparse, labels, **case.options), hidden)
    plain = with_gradient(lambda h: textbook.topk_kl(F.linear(h, weight), *sparse, labels, **case.options), hidden)
    yield Errors("linear_topk_kl", dtype, case.name, error(ours, truth), error(plain, truth))


def gumbel_topk(dtype: torch.dtype) -> Iterator[Errors]:
    """Noise-free, so that the textbook needs no Philox; the noise has the reference's bits, which the tests compare."""
    for length, tau, scale in ((30, 0.7, 2.0), (128, 0.7, 2.0), (128, 0.05, 2.0), (30, 1.0, 100.0)):
        theta = torch.linspace(-1, 1, length).mul(scale).to(dtype)
        k, incoming = length * 3 // 4, torch.linspace(-1, 1, length)
        for relaxation in ("softmax", "threshold"):

            def sample(z: Tensor, relaxation: str = relaxation, k: int = k, tau: float = tau) -> Tensor:
                return e3k.gumbel_topk(z, k, tau=tau, noise_scale=0.0, relaxation=relaxation).probs

            def relaxed(z: Tensor, relaxation: str = relaxation, k: int = k, tau: float = tau) -> Tensor:
                if relaxation == "softmax":
                    return k * torch.softmax(z / tau, -1)
                d = z.detach().double()
                low, high = d.min() - 50 * tau, d.max() + 50 * tau
                for _ in range(80):
                    middle = (low + high) / 2
                    above = torch.sigmoid((d - middle) / tau).sum() > k
                    low, high = (middle, high) if above else (low, middle)
                # c moves with θ by the implicit function theorem; its value is d's.
                a = torch.sigmoid((d - low) / tau) * (1 - torch.sigmoid((d - low) / tau))
                share = (a / a.sum().clamp_min(1e-300)).to(z.dtype)
                c = low.to(z.dtype) + (share * (z - z.detach())).sum()
                return torch.sigmoid((z - c) / tau)

            truth = with_gradient(lambda z, f=sample, g=incoming: (f(z) * g).sum(), theta.double())
            ours = with_gradient(lambda z, f=sample, g=incoming: (f(z) * g.to(z.dtype)).sum(), theta)
            plain = with_gradient(lambda z, f=relaxed, g=incoming: (f(z) * g.to(z.dtype)).sum(), theta)
            edge = f"{relaxation}, L {length}, τ {tau}, θ to ±{scale:g}"
            yield Errors("gumbel_topk", dtype, edge, error(ours, truth), error(plain, truth))


def gated_residual(dtype: torch.dtype) -> Iterator[Errors]:
    generator = torch.Generator().manual_seed(0)
    hidden, branch = (torch.randn(4, 33, 100, generator=generator).to(dtype) for _ in range(2))
    for name, gate in (
        ("m 0.3", torch.tensor(0.3)), ("m 0", torch.tensor(0.0)), ("m 1", torch.tensor(1.0)),
        ("a gate a row", torch.rand(4, 1, 1, generator=generator)), ("a gate an element", torch.rand(100)),
    ):  # fmt: skip
        truth = with_gradient(lambda m: e3k.gated_residual(hidden.double(), branch.double(), m), gate.double())
        ours = with_gradient(lambda m: e3k.gated_residual(hidden, branch, m), gate)
        plain = with_gradient(lambda m: hidden + m.to(dtype) * (branch - hidden), gate)
        yield Errors("gated_residual", dtype, name, error(ours, truth), error(plain, truth))


def measurements() -> Iterator[Errors]:
    for dtype in DTYPES:
        for case in CASES:
            if dtype != torch.float16 or case.offset == 0:  # fp16 logits near 1000 are multiples of ½
                yield entropy_kl(case, dtype)
            if case.offset == 0 and not case.masked:
                yield from (topk_kl(case, dtype, tail) for tail in ("bucket", "renorm"))
            if case.offset == 0 and not case.masked and not case.one_valid and case.scale == 3.0:
                yield from linear(case, dtype)
        yield from gumbel_topk(dtype)
        yield from gated_residual(dtype)


def document(rows: list[Errors]) -> str:
    environment = describe_environment()
    lines = [
        f"`python bench/accuracy.py` at commit {environment['commit']}, "
        f"{environment['machine']['processor']} ({native_isa()}), torch {environment['versions']['torch']}.",
        "",
        "| op | dtype | edge | our error | the textbook's | within the bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row.op, str(row.dtype).removeprefix("torch."), row.edge, f"{row.ours:.1e}", f"{row.naive:.1e}")
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.holds else '**no**'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    rows = list(measurements())
    text = document(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    with replacing_file(RESULTS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    failed = [row for row in rows if not row.holds]
    print(f"{len(rows)} cases, {len(failed)} beyond the bound", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
