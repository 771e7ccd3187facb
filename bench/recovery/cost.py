"""What recovery from a cached teacher costs, beside a live one -> bench/results/recovery-cost.json

PYTHONPATH=bench:bench/ops python -m recovery.cost      (where e3kernels is not installed, its paths too)

The cache: bytes per token on disk, rates of writing and reading. Training: tokens per second from the cache and from
the live teacher, the same student and batches, in turns; the memory a run takes above the models. The losses: the
memory of one value and gradient above inputs and results, beside TRL's and eager's.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import heads
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import e3kernels as e3k
import e3pruner
from e3kernels import textbook
from e3kernels.profiling import RangeRecorder
from e3pruner import TeacherCache
from e3pruner.models import find_layers
from e3pruner.models.loading import Dtype, load_model, load_tokenizer
from e3pruner.profiling.model.profile import without_middle
from e3pruner.profiling.process_memory import peak_above_inputs
from e3pruner.profiling.step.profile import STEP
from e3pruner.recovery import Teacher
from e3pruner.report import describe_environment
from e3pruner.storage import fingerprint, write_json, write_tensors
from e3pruner.text.batches import shuffled_batch
from e3pruner.text.built_in import demo_tokens
from e3pruner.text.splits import take

RESULTS = Path(__file__).parents[1] / "results" / "recovery-cost.json"
K = 10
MEGABYTE = 1e6


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def read_all(folder: Path, data: Tensor, batch: int) -> None:
    """An epoch in random order, by a reader that has nothing open yet."""
    cache = TeacherCache(folder)
    for start in range(0, len(data), batch):
        cache.targets(shuffled_batch(data, start, batch, seed=0))


def forget(files: list[Path]) -> None:
    """Drops the files from the page cache, so that the next reader waits for the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cache_figures(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Tensor, folder: Path, batch: int
) -> dict[str, float]:
    """`store` is the writing of a finished shard alone, with its checksum; `make` the teacher's passes and all."""
    make = seconds(lambda: e3pruner.cache_teacher(teacher, data, folder, tokenizer=tokenizer, k=K))
    shards = sorted(folder.glob("*.safetensors"))
    size, tokens = sum(file.stat().st_size for file in folder.iterdir()), data.numel()
    shard = load_file(shards[0])
    store = seconds(lambda: write_tensors(folder / "again", shard, {"content": fingerprint(shard)}))
    (folder / "again").unlink()
    forget(shards)
    disk = seconds(lambda: read_all(folder, data, batch))
    memory = seconds(lambda: read_all(folder, data, batch))
    rates = {"make": make, "store": store * size / shards[0].stat().st_size, "read_disk": disk, "read_memory": memory}
    figures: dict[str, float] = {"tokens": tokens, "k": K, "bytes": size, "bytes_per_token": size / tokens}
    for name, took in rates.items():
        figures |= {f"{name}_tokens_per_s": tokens / took, f"{name}_mb_per_s": size / MEGABYTE / took}
    return figures


def step_seconds(student: PreTrainedModel, teacher: PreTrainedModel | Teacher, **options: Any) -> list[float]:
    """Of every step of a run but the first."""
    with RangeRecorder() as recorder:
        e3pruner.distill(student, teacher=teacher, **options)
    steps = sorted((r for r in recorder.ranges if r.name == STEP), key=lambda r: r.start)
    return [step.end - step.start for step in steps[1:]]


def training_figures(
    teacher: PreTrainedModel, cache: TeacherCache, data: Tensor, drop: int, batch: int, steps: int, rounds: int
) -> dict[str, Any]:
    pruned = e3pruner.prune(teacher, without_middle(len(find_layers(teacher)), drop))
    teachers: dict[str, PreTrainedModel | Teacher] = {"live": teacher, "cache": cache}
    took: dict[str, list[float]] = {name: [] for name in teachers}
    options = {"data": data, "batch_size": batch, "steps": steps + 1}
    for _ in range(rounds):
        for name, source in teachers.items():
            took[name] += step_seconds(copy.deepcopy(pruned), source, **options)
    figures: dict[str, Any] = {"batch": batch, "length": data.shape[1], "drop": drop}
    for name, source in teachers.items():
        student = copy.deepcopy(pruned)
        peak = peak_above_inputs(partial(e3pruner.distill, student, teacher=source, **options))
        rate = batch * data.shape[1] / statistics.median(took[name])
        figures[name] = {"tokens_per_s": rate, "step_seconds": took[name], "peak_bytes": peak}
    figures["cache_over_live"] = figures["cache"]["tokens_per_s"] / figures["live"]["tokens_per_s"]
    return figures | {"teacher_bytes": sum(p.nbytes for p in teacher.parameters())}


def trl_whole(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL of whole logits, as TRL's off-policy trainer computes it; unweighted."""
    from trl.experimental.gkd import GKDTrainer  # seconds

    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0)


def trl_linear(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """TRL's tiled loss; unweighted."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0)[0].mean()


def loss_calls(
    size: tuple[int, int, int], dtype: torch.dtype
) -> Iterator[tuple[dict[str, Any], Callable[[], tuple[Tensor, ...]]]]:
    """(what it is, a call that gives the gradients) of each loss: from hidden states with the student's head frozen and
    trained, and from logits that are there anyway. TRL has no loss against stored predictions.
    """
    hidden, weight, teacher_hidden, teacher_weight = heads.make(*size, dtype)
    logprobs, ids = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1).topk(K)
    dense, stored = (teacher_hidden, teacher_weight), (logprobs, ids)
    linear: dict[tuple[str, str], Callable[[Tensor, Tensor], Any]] = {
        ("linear_topk_kl", "e3"): lambda h, w: e3k.linear_topk_kl(h, w, *stored),
        ("linear_topk_kl", "eager"): lambda h, w: textbook.topk_kl(F.linear(h, w), *stored),
        ("linear_entropy_kl", "e3"): lambda h, w: e3k.linear_entropy_kl(h, w, *dense),
        ("linear_entropy_kl", "eager"): lambda h, w: textbook.entropy_kl(F.linear(h, w), F.linear(*dense)),
        ("linear_entropy_kl", "trl, tiled"): lambda h, w: trl_linear(h, w, *dense),
        ("linear_entropy_kl", "trl, whole logits"): lambda h, w: trl_whole(F.linear(h, w), F.linear(*dense)),
    }
    for head in ("frozen", "trained"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(head == "trained")
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for (loss, provider), call in linear.items():
            about = {"loss": loss, "provider": provider, "head": head}
            yield about, lambda call=call, leaves=leaves, wanted=wanted: torch.autograd.grad(call(*leaves), wanted)
    logits, target = F.linear(hidden, weight).requires_grad_(), F.linear(*dense)
    whole: dict[tuple[str, str], Callable[[], Any]] = {
        ("topk_kl", "e3"): lambda: e3k.topk_kl(logits, *stored),
        ("topk_kl", "eager"): lambda: textbook.topk_kl(logits, *stored),
        ("entropy_kl", "e3"): lambda: e3k.entropy_kl(logits, target),
        ("entropy_kl", "eager"): lambda: textbook.entropy_kl(logits, target),
        ("entropy_kl", "trl, whole logits"): lambda: trl_whole(logits, target),
    }
    for (loss, provider), whole_call in whole.items():
        about = {"loss": loss, "provider": provider, "head": None}
        yield about, lambda call=whole_call: torch.autograd.grad(call(), logits)


def memory_rows(sizes: list[tuple[int, int, int]], dtype: torch.dtype) -> list[dict[str, Any]]:
    """`peak_bytes`: above the inputs and the gradients that are returned."""
    rows = []
    for size in sizes:
        for about, call in track(list(loss_calls(size, dtype)), f"losses {size}", console=Console(stderr=True)):
            gradients = sum(gradient.nbytes for gradient in call())  # the first call makes what is made once
            peak = peak_above_inputs(call)
            rows.append(
                about
                | dict(zip(("H", "V", "N"), size, strict=True))
                | {"dtype": str(dtype).removeprefix("torch."), "gradient_bytes": gradients}
                | {"peak_bytes": None if peak is None else max(0, peak - gradients)}
            )
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--drop", type=int, default=8, help="layers that the student lacks, the middle ones")
    parser.add_argument("--sequences", type=int, default=200, help="of the cache")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    teacher, tokenizer = load_model(given.model, dtype=Dtype.FLOAT32), load_tokenizer(given.model)
    data = take(demo_tokens(tokenizer, length=given.length).training, given.sequences, "--sequences")
    with tempfile.TemporaryDirectory(dir=given.out.parent) as temporary:
        folder = Path(temporary) / "cache"
        results: dict[str, Any] = {"cache": cache_figures(teacher, tokenizer, data, folder, given.batch)}
        print(results["cache"], flush=True)
        cache = TeacherCache(folder)
        results["training"] = training_figures(teacher, cache, data, given.drop, given.batch, given.steps, given.rounds)
    print(results["training"], flush=True)
    del teacher
    results["losses"] = memory_rows(heads.SIZES, torch.bfloat16)
    for row in results["losses"]:
        print(row)
    command = shlex.join(["python", "-m", "recovery.cost", *arguments])
    write_json(given.out, results | {"command": command, "environment": describe_environment()})


if __name__ == "__main__":
    main(sys.argv[1:])
