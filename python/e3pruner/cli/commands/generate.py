"""e3 generate: text from a model, with its speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

from e3pruner import LayerSkipRuntime, PruningPlan, prune
from e3pruner.cli import options
from e3pruner.cli.command import stderr
from e3pruner.evaluation.generation import continue_prompt
from e3pruner.models.loading import load_model, load_tokenizer


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    keep: Annotated[str | None, typer.Option(help="Run only these layers, as in 0-11,19-29.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Run the layers that a pruning.json keeps only.", exists=True, dir_okay=False)
    ] = None,
    speculative: Annotated[
        bool,
        typer.Option(
            "--speculative", help="Experimental, no model has shown a gain yet: the kept layers draft, all verify."
        ),
    ] = False,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")] = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    config: options.Config = None,
) -> None:
    """Stream a continuation of a prompt to stdout and its tokens/s to stderr.

    With --keep or --plan the C++ runtime decodes; what it does not serve Hugging Face does, and a line says why.

    Example: `e3 generate --model recovered --prompt "What is a hash table?"`
    """
    layers = _kept_layers(keep, plan)
    if speculative and layers is None:
        raise ValueError("--speculative needs the layers that draft: give --keep or --plan")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    network = load_model(model, device, dtype, trust_remote_code=trust_remote_code)
    writer = network if layers is None else _of_layers(network, layers, speculative)
    runtime = writer if isinstance(writer, LayerSkipRuntime) else None
    extra = {} if runtime is None else {"seed": seed, "draft_keep": layers if speculative else None}
    torch.manual_seed(seed)
    began = time.perf_counter()
    new_tokens = continue_prompt(writer, tokenizer, prompt, max_new_tokens, chat, temperature, stream=True, **extra)
    seconds = time.perf_counter() - began
    if runtime is not None and runtime.speculation is not None:
        counts = runtime.speculation
        stderr.print(f"{counts.accepted} of {counts.drafted} drafted tokens accepted", style="dim")
    stderr.print(f"{len(new_tokens)} tokens in {seconds:.2f} s: {len(new_tokens) / seconds:.1f} tokens/s", style="dim")


def _of_layers(network: PreTrainedModel, layers: list[int], speculative: bool) -> LayerSkipRuntime | PreTrainedModel:
    """The runtime with `layers`, or with all that verify their drafts; where it does not serve the model, and a line
    says why, the model of these layers."""
    try:
        runtime = LayerSkipRuntime(network)
    except (ImportError, TypeError, ValueError) as error:
        if speculative:
            raise
        stderr.print(f"Hugging Face decodes this model, LayerSkipRuntime does not: {error}", style="dim")
        return prune(network, layers, copy_weights=False)
    if not speculative:
        runtime.keep = layers
    return runtime


def _kept_layers(keep: str | None, plan: Path | None) -> list[int] | None:
    """The layers of `--keep` or `--plan`, None without either."""
    if keep is not None and plan is not None:
        raise ValueError("--keep and --plan both name layers: give one")
    if plan is not None:
        return PruningPlan.load(plan).kept
    return None if keep is None else [layer for part in keep.split(",") for layer in _layer_range(part)]


def _layer_range(part: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"--keep has {part!r}; it lists layers and ranges of layers, as in 0-11,19-29")
    return range(int(first), int(last if dash else first) + 1)
