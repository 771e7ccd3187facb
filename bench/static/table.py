"""The record of bench.static as Markdown tables."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from bench.static.capture import TARGETS

Document = dict[str, Any]
# What one logit (of each model) costs on its way to its gradient: the kernels that sweep the vocabulary.
WAYS = (
    ("entropy_kl, mean", "ours", "entropy_kl/bf16/forward", ("entropy_kl_statistics", "entropy_kl_gradient")),
    ("entropy_kl, one kernel a row", "ours", "entropy_kl/bf16/forward/row", ("entropy_kl_row",)),
    ("Liger fused-linear KL, from the teacher's probabilities", "peers", "liger/bf16", ("_kl_div_kernel",)),
    ("Liger KL, from log-probabilities¹", "peers", "liger/bf16", ("_kldiv_kernel_forward", "_kldiv_kernel_backward")),
    ("topk_kl, mean (no teacher logits)", "ours", "topk_kl/bf16/bucket", ("topk_kl_statistics", "topk_kl_gradient")),
    ("entropy_kl, mean", "ours", "entropy_kl/fp32/forward", ("entropy_kl_statistics", "entropy_kl_gradient")),
    ("TRL", "peers", "trl/fp32", ("_stats_kernel", "_backward_kernel")),
)
NOTE = (
    "The minimum is 5 accesses an item: each model's logit read once for the statistics and once for the gradient, "
    "the gradient written once; 3 for a stored teacher. ¹ Making both log-probabilities and taking the gradient back "
    "through `log_softmax` is PyTorch's, and moves 14 bytes more: 2 reads and 2 writes, then 2 reads and a write."
)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    header = list(header)
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def _bytes(document: Document) -> Iterator[str]:
    def row(title: str, side: str, variant: str, kernels: tuple[str, ...]) -> list[object]:
        moved = [document[side][variant][kernel]["sm_90"]["bytes_per_element"] for kernel in kernels]
        return [title, variant.split("/")[1], " + ".join(f"{x:g}" for x in moved), f"{sum(moved):g}"]

    yield from _table(("way", "dtype", "bytes a logit, by kernel", "sum"), (row(*way) for way in WAYS))


def _instructions(document: Document) -> Iterator[str]:
    """One row per way, a column per target of NVIDIA's."""
    families = [family for family in TARGETS if family.startswith("sm_")]

    def row(title: str, side: str, variant: str, kernels: tuple[str, ...]) -> list[object]:
        def counted(family: str) -> str:
            counts = [document[side][variant][kernel][family]["instructions_per_element"] for kernel in kernels]
            return " + ".join("–" if count is None else f"{count:.1f}" for count in counts)

        return [title, variant.split("/")[1], *map(counted, families)]

    yield from _table(("way", "dtype", *families), (row(*way) for way in WAYS))


def _widths(row: dict[str, Any]) -> str:
    found = {int(re.sub(r"\D", "", access)) for access in row["accesses"]}
    return "/".join(str(width) for width in sorted(found, reverse=True))


def _count(row: dict[str, Any]) -> str:
    count = row["instructions_per_element"]
    return "" if count is None else f" · {count:.1f}"


def _cell(row: dict[str, Any]) -> str:
    return (
        f"{row['registers']} · {row['spills']} · {row['shared']} · {row['occupancy']:.0%} · {_widths(row)}{_count(row)}"
    )


def _binaries(rows: dict[str, Any]) -> Iterator[str]:
    def cells(variant: str, kernel: str, families: dict[str, Any]) -> list[object]:
        moved = next(iter(families.values()))["bytes_per_element"]
        read = (_cell(families[family]) if family in families else "" for family in TARGETS)
        return [variant, f"`{kernel}`", *read, "–" if moved is None else f"{moved:g}"]

    seen: set[str] = set()
    lines = []
    for variant, kernels in rows.items():
        for kernel, families in kernels.items():
            line = cells(variant, kernel, families)
            if str(line[1:]) not in seen:  # kernels that variants share are shown once
                seen.add(str(line[1:]))
                lines.append(line)
    yield from _table(("variant", "kernel", *TARGETS, "bytes"), lines)


def _spills(rows: dict[str, Any]) -> int:
    return sum(row["spills"] for kernels in rows.values() for families in kernels.values() for row in families.values())


def _cuda(kernels: dict[str, Any]) -> Iterator[str]:
    lines = (
        [f"`{name}`", *(f"{row['registers']} · {row['spills']}" for row in targets.values())]
        for name, targets in kernels.items()
    )
    yield from _table(("kernel", *next(iter(kernels.values()))), lines)


def _estimates(document: Document) -> Iterator[str]:
    gpus = document["roofline_estimates"]["gpus"]
    names = list(next(iter(next(iter(gpus.values())).values())))
    lines = (
        [gpu, shape, *(f"{values[name]:.2f}" for name in names)]
        for gpu, shapes in gpus.items()
        for shape, values in shapes.items()
    )
    yield from _table(("GPU", "shape", *(name.removesuffix("_ms") for name in names)), lines)
    for peer, shape in (("liger", "Liger's shape on an A100"), ("cce", "Cut Cross Entropy's shape on an A100")):
        compared = document["roofline_estimates"][peer]
        yield compared["assumptions"]
        yield ""
        values = ((name, f"{value:.3g}") for name, value in compared.items() if name != "assumptions")
        yield from _table((shape, "value"), values)


def markdown(document: Document) -> str:
    """The tables of a record."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        "# What the compiled kernels say",
        "",
        f"{document['what']} `{document['command']}`, commit {document['commit'][:12]}, {document['machine']}; "
        f"{versions}.",
        "",
        "## Bytes a logit",
        "",
        *_bytes(document),
        NOTE,
        "",
        "## Instructions a logit",
        "",
        *_instructions(document),
        "Executed by a thread in the loops whose loads have no mask, over the logits (of each model) that they load; – "
        "where every load has one. What a sweep can be at best is its bytes' time or its instructions'.",
        "",
        f"## Our binaries: {_spills(document['ours'])} spills",
        "",
        "A cell: registers · spills · shared memory (bytes) · occupancy · widths of the hot loops' accesses (bits) "
        "· instructions an element, where counted. Bytes: global bytes an element of the kernel's tiles; – where its "
        "tiles are operands of a product.",
        "",
        *_binaries(document["ours"]),
        "## The peers' binaries",
        "",
        *_binaries(document["peers"]),
    ]
    if document["cuda"] is not None:
        lines += ["## The runtime's CUDA kernels, by nvcc", "", "A cell: registers · bytes spilled.", ""]
        lines += _cuda(document["cuda"])
    lines += ["## Roofline estimates in ms, bf16, forward and backward: datasheet figures, nothing measured", ""]
    lines += _estimates(document)
    return "\n".join(lines)
