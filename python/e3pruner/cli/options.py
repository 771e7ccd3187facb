"""The options that several sub-commands share: one name and one meaning everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from e3pruner.cli.config import PAIRS, check_device, load_config
from e3pruner.models.loading import Dtype as Dtype
from e3pruner.models.loading import Placement as Placement

Model = Annotated[
    str,
    typer.Option(help="Folder or Hub id of a causal LM, or `smollm2` for SmolLM2-135M-Instruct from PyPI."),
]
Teacher = Annotated[
    str | None, typer.Option(help="The dense model to compare with or learn from, or whose predictions to store.")
]
Out = Annotated[Path, typer.Option(help="Folder for the result; it appears when the result is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run left at --out.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all randomness; the same seed gives the same result.")]
Device = Annotated[
    str,
    typer.Option(
        help="Where the models run: cpu, cuda, cuda:1, xpu, ...; auto takes a GPU if there is one, and says so.",
        callback=check_device,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a checkpoint brings. It has all your rights.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Weights' type in memory; auto takes the checkpoint's.")]
PlacementOption = Annotated[
    Placement,
    typer.Option(
        "--placement",
        help="whole: all weights on --device; stream: a layer's come there when it is called and leave again, so that "
        "a model may be larger than the memory.",
    ),
]
SavedDtype = Annotated[Dtype, typer.Option("--dtype", help="Weights' type in what comes out; auto takes --model's.")]
Text = Annotated[
    Path | None,
    typer.Option(
        help="Where tokens come from: plain text (UTF-8), .jsonl with text or messages, or a folder of a Hugging Face "
        "data set; without it, the built-in English technical prose."
    ),
]
Sequences = Annotated[int, typer.Option(min=1, help="Number of calibration sequences.")]
HeldOut = Annotated[int, typer.Option(min=1, help="Number of held-out sequences, from another part of the text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences that go through the model at a time.")]
Vocabulary = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Columns of the predictions that count, from the first on; for models that pad their vocabularies "
        "differently. If not given, what is beyond the tokenizer's last token is cut where it has to be.",
    ),
]
Drop = Annotated[int | None, typer.Option(help="Number of layers to remove; 8 where no other target is given.")]
Fraction = Annotated[float | None, typer.Option(help="Share of the layers to remove, instead of --drop.")]
Protect = Annotated[list[int] | None, typer.Option(help="A layer that must stay; may be repeated.")]
Writing = Annotated[
    int, typer.Option(min=0, help="Prompts that each model writes from, to count loops and right answers; 0: none.")
]
Speed = Annotated[bool, typer.Option(help="Measure decode and prefill tokens/s.")]


def search_option(*names: str) -> Any:
    return typer.Option(*names, metavar=PAIRS, help="An option of the search method; may be repeated.")


def recover_option(*names: str) -> Any:
    return typer.Option(*names, metavar=PAIRS, help="An option of `e3pruner.distill`; may be repeated.")


# Where a command has one step only, --option is the same.
Search = Annotated[list[str] | None, search_option("--search", "--option")]
Recover = Annotated[list[str] | None, recover_option("--recover", "--option")]
Track = Annotated[
    str | None,
    typer.Option(
        help="Show the curves meanwhile in tensorboard (files in --out, under tensorboard), wandb or trackio."
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Upload the finished checkpoint, with its card, to the Hugging Face Hub."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with any of these options; the command line wins over it.",
        is_eager=True,
        callback=load_config,
        exists=True,
        dir_okay=False,
    ),
]
