"""SmolLM2-135M through LayerSkipRuntime, Hugging Face and, where installed, llama.cpp, beside the read bandwidth.

    python bench/runtime/bench_runtime.py [CASE ...] [--out FILE.jsonl] [--rounds N] [--keep-plan pruning.json]

Cases: parity, decode, masks, prefill, overhead, speculative. Run it alone on the machine; figures are medians of rounds
that alternate between the providers. A step reads every weight once, so tokens/s ≤ bandwidth / weight bytes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from prompts import prompts
from record import Recorder, seconds_of, spread
from transformers import PreTrainedModel

from e3pruner import LayerSkipRuntime, PruningPlan, prune
from e3pruner.models import load_smollm2

NEW = 256
SHORT = 64
WARM_UP = 16
PROMPT = 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What the demo's search removes first; `--keep-plan` takes a plan of one's own.
REMOVED = {4: [13, 14, 15, 16], 8: [12, 13, 14, 15, 16, 17, 18, 26], 12: [*range(10, 21), 26]}


class ReadProbe:
    """Bytes per second that all threads read from memory: the faster of a sum and a matrix-vector product of 1 GiB."""

    def __init__(self) -> None:
        self.matrix, self.vector = torch.ones(1 << 14, 1 << 14), torch.ones(1 << 14)

    def __call__(self) -> float:
        times = seconds_of(self.matrix.sum, lambda: self.matrix @ self.vector, rounds=5)
        return self.matrix.nbytes / min(statistics.median(mine) for mine in times)


def keep_without(removed: Iterable[int]) -> list[int]:
    return sorted(set(range(30)) - set(removed))


def loaded(dtype: str) -> tuple[PreTrainedModel, torch.Tensor, Any]:
    model, tokenizer = load_smollm2(DTYPES[dtype])
    model.generation_config.eos_token_id = None  # every run has the same length
    return model, tokenizer(prompts()[0], return_tensors="pt").input_ids[:, :16], tokenizer


def hugging_face(model: PreTrainedModel, ids: torch.Tensor, new: int = NEW, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def llama_cpp(folder: Path | None, dtype: str) -> Any:
    """llama.cpp over a GGUF of the same weights, `smollm2-{dtype}.gguf` in `folder`; None where either is missing."""
    file = folder / f"smollm2-{dtype}.gguf" if folder else None
    if file is None or not file.exists():
        return None
    from llama_cpp import Llama

    return Llama(str(file), n_ctx=512, n_threads=torch.get_num_threads(), verbose=False)


def bench_parity(record: Recorder, _: argparse.Namespace) -> None:
    """Greedy texts, ten prompts a batch, and the logits along them, in the fused path's steps, against eager fp32."""
    model, _ids, tokenizer = loaded("fp32")
    model.set_attn_implementation("eager")
    runtime = LayerSkipRuntime(model)
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT] for text in prompts()])
    worst, same = 0.0, 0
    for batch in ids.split(10):
        expected = hugging_face(model, batch)
        same += int((runtime.generate(batch, max_new_tokens=NEW) == expected).all(-1).sum())
        for row in expected.split(1):
            with torch.no_grad():
                logits = model(row).logits
            cache = runtime.new_cache(1)
            steps = torch.cat([runtime.append(cache, part, part.shape[1]) for part in row.split(16, dim=1)], dim=1)
            worst = max(worst, float((steps - logits).abs().max() / logits.abs().max()))
    record("parity", "runtime", prompts=len(ids), identical_texts=same, worst_relative_logit_difference=worst)


def bench_decode(record: Recorder, options: argparse.Namespace) -> None:
    """The bandwidth is read right before and after each provider's run: the share of the limit takes the larger."""
    probe = ReadProbe()
    for dtype in options.dtypes:
        model, ids, _ = loaded(dtype)
        runtime = LayerSkipRuntime(model)
        peer = llama_cpp(options.gguf, dtype)
        actions: dict[str, Callable[[int], Any]] = {
            "runtime": lambda new, runtime=runtime, ids=ids: runtime.generate(ids, max_new_tokens=new),
            "huggingface": lambda new, model=model, ids=ids: hugging_face(model, ids, new),
        }
        if peer is not None:
            actions["llama.cpp"] = lambda new, peer=peer, ids=ids: _llama_tokens(peer, ids, new)
        for action in actions.values():
            action(WARM_UP)
        speeds: dict[str, list[float]] = {provider: [] for provider in actions}
        limits: dict[str, list[float]] = {provider: [] for provider in actions}
        for _ in range(options.rounds):
            before = probe()
            for provider, action in actions.items():
                speeds[provider].append(NEW / seconds_of(lambda action=action: action(NEW), rounds=1)[0][0])
                after = probe()
                limits[provider].append(max(before, after) / runtime.weight_bytes)
                before = after
        for provider, mine in speeds.items():
            share = statistics.median(a / b for a, b in zip(mine, limits[provider], strict=True))
            bandwidth = statistics.median(limits[provider]) * runtime.weight_bytes / 1e9
            ratio = statistics.median(a / b for a, b in zip(speeds["runtime"], mine, strict=True))
            record(
                "decode",
                provider,
                dtype=dtype,
                **spread(mine),
                share_of_limit=share,
                read_gb_per_second=bandwidth,
                runtime_is_faster_by=ratio,
            )


def _llama_tokens(peer: Any, ids: torch.Tensor, new: int) -> None:
    """Greedy by its C interface and NumPy's argmax: the binding's own sampling would be charged to the peer."""
    import llama_cpp as api
    import numpy as np

    peer._ctx.kv_cache_clear()
    tokens = ids[0].tolist()
    for _ in range(new):
        held = (api.llama_token * len(tokens))(*tokens)  # the batch only points to it
        if api.llama_decode(peer.ctx, api.llama_batch_get_one(held, len(tokens))):
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(peer.ctx, -1), (peer.n_vocab(),))
        tokens = [int(logits.argmax())]


def bench_masks(record: Recorder, options: argparse.Namespace) -> None:
    """Short texts and many rounds: what is compared differs by a few per cent, and the machine drifts by more."""
    model, ids, _ = loaded("bf16")
    runtime = LayerSkipRuntime(model)
    dense_bytes = runtime.weight_bytes
    keeps = {drop: keep_without(removed) for drop, removed in REMOVED.items()}
    pruned = {drop: LayerSkipRuntime(prune(model, keep, copy_weights=False)) for drop, keep in keeps.items()}

    def masked(keep: list[int] | None) -> None:
        runtime.keep = keep
        runtime.generate(ids, max_new_tokens=SHORT)

    actions = {"dense": lambda: masked(None)}
    for drop, keep in keeps.items():
        actions[f"mask {drop}"] = lambda keep=keep: masked(keep)
        actions[f"pruned {drop}"] = lambda drop=drop: pruned[drop].generate(ids, max_new_tokens=SHORT)
    for action in actions.values():
        action()
    times = dict(zip(actions, seconds_of(*actions.values(), rounds=3 * options.rounds), strict=True))

    def paired(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    for drop in keeps:
        ratio = dense_bytes / pruned[drop].weight_bytes
        for kind in ("mask", "pruned"):
            gain = paired("dense", f"{kind} {drop}")
            figures = spread([SHORT / seconds for seconds in times[f"{kind} {drop}"]])
            figures |= {"speed_up": gain, "share_of_byte_ratio": gain / ratio}
            figures["speed_of_pruned"] = paired(f"pruned {drop}", f"{kind} {drop}")
            record(f"masks-{drop}", kind, dtype="bf16", **figures)


def bench_prefill(record: Recorder, options: argparse.Namespace) -> None:
    for dtype in options.dtypes:
        model, _ids, _ = loaded(dtype)
        ids = torch.randint(0, model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
        runtime = LayerSkipRuntime(model)

        def of_hugging_face(model: PreTrainedModel = model, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(ids, use_cache=True, logits_to_keep=1)

        def of_runtime(runtime: LayerSkipRuntime = runtime, ids: torch.Tensor = ids) -> None:
            runtime.append(runtime.new_cache(1, capacity=512), ids)

        of_runtime(), of_hugging_face()
        times = seconds_of(of_runtime, of_hugging_face, rounds=3 * options.rounds)
        for provider, mine in zip(("runtime", "huggingface"), times, strict=True):
            record("prefill-512", provider, dtype=dtype, **spread([512 / seconds for seconds in mine]))


def bench_overhead(record: Recorder, options: argparse.Namespace) -> None:
    """What Python adds: a request less the time of its C++ call; a mask change; memory over 10,000 tokens."""
    model, ids, _ = loaded("bf16")
    runtime = LayerSkipRuntime(model, keep=[0])  # few layers: a small difference of large numbers is noise
    inside: list[float] = []
    native = runtime._decoder

    class Timed:
        """The compiled decoder with a clock around its loop."""

        def generate(self, *arguments: Any) -> Any:
            began = time.perf_counter()
            out = native.generate(*arguments)
            inside.append(time.perf_counter() - began)
            return out

        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

    runtime._decoder = Timed()
    (whole,) = seconds_of(lambda: runtime.generate(ids, max_new_tokens=NEW), rounds=10 * options.rounds)
    outside = statistics.median(a - b for a, b in zip(whole, inside, strict=True))
    keeps = [list(range(30)), list(range(0, 30, 2))]
    changes = []
    for i in range(1000):
        began = time.perf_counter()
        runtime.keep = keeps[i % 2]
        changes.append(time.perf_counter() - began)
    runtime.keep = [0, 29]
    runtime.generate(ids, max_new_tokens=2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        runtime.generate(ids, max_new_tokens=2000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    record(
        "overhead",
        "runtime",
        microseconds_outside_per_token=outside / NEW * 1e6,
        microseconds_a_mask_change=statistics.median(changes) * 1e6,
        kib_grown_over_10000_tokens=grown,
    )


def bench_speculative(record: Recorder, options: argparse.Namespace) -> None:
    """Drafts of ever fewer layers, and one that keeps all attention: the same text, how fast, how often accepted."""
    model, _ids, tokenizer = loaded("bf16")
    runtime = LayerSkipRuntime(model)
    dense_bytes = runtime.weight_bytes
    drafts: dict[str, Any] = {f"drop {drop}": keep_without(removed) for drop, removed in REMOVED.items()}
    drafts["drop 20"] = keep_without(set(range(30)) - {0, 1, 2, 7, 8, 9, 11, 27, 28, 29})
    drafts["drop 12 MLPs"] = {"attention": range(30), "mlp": keep_without(REMOVED[12])}
    if options.keep_plan:
        drafts = {"plan": PruningPlan.load(options.keep_plan).kept} | drafts
    gains: dict[str, list[float]] = {name: [] for name in drafts}
    counts = {name: torch.zeros(3, dtype=torch.long) for name in drafts}
    for text in prompts()[:4]:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]
        plain, seconds = timed(lambda ids=ids: runtime.generate(ids, max_new_tokens=NEW))
        for name, draft in drafts.items():
            drafted, mine = timed(
                lambda ids=ids, draft=draft: runtime.generate(ids, max_new_tokens=NEW, draft_keep=draft)
            )
            if not torch.equal(drafted, plain):
                raise AssertionError(f"speculative text differs with draft {name}")
            gains[name].append(seconds / mine)
            of_run = runtime.speculation
            counts[name] += torch.tensor([of_run.drafted, of_run.accepted, of_run.verifications])
    for name, draft in drafts.items():
        runtime.keep = draft
        cost = runtime.weight_bytes / dense_bytes
        tried, accepted, verified = counts[name].tolist()
        record(
            "speculative",
            name,
            dtype="bf16",
            texts_identical=len(gains[name]),
            speed_up=statistics.median(gains[name]),
            acceptance=accepted / max(1, tried),
            acceptance_needed=least_acceptance(cost),
            draft_cost=cost,
            drafted=tried,
            verifications=verified,
        )


def timed(action: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    out = action()
    return out, time.perf_counter() - began


def least_acceptance(cost: float, gain: float = 1.2, longest: int = 7) -> float | None:
    """The acceptance rate from which the best draft length gains `gain`, were verification free; None: none does."""
    for rate in (i / 1000 for i in range(1000)):
        if any((1 - rate ** (k + 1)) / (1 - rate) / (1 + k * cost) >= gain for k in range(1, longest + 1)):
            return rate
    return None


CASES = {name.removeprefix("bench_"): value for name, value in dict(globals()).items() if name.startswith("bench_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of decode and prefill")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep-plan", type=Path)
    parser.add_argument("--gguf", type=Path, help="folder of smollm2-bf16.gguf and smollm2-fp32.gguf for llama.cpp")
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown cases {unknown}; there are {sorted(CASES)}")
    record = Recorder(options.out)
    for case in options.cases:
        CASES[case](record, options)


if __name__ == "__main__":
    main()
