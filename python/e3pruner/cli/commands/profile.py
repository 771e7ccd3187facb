"""e3 profile: where the time and the bytes go, for a model, a training step and the operations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from e3kernels.profiling import TRACE_FILE, Profile, Trace
from e3pruner.cli import options
from e3pruner.cli.command import Command, command_line
from e3pruner.cli.config import result_folder
from e3pruner.cli.tables import console, rich_table
from e3pruner.evaluation.target import check_target
from e3pruner.models.device import usable_device
from e3pruner.models.loading import load_model, load_tokenizer
from e3pruner.profiling.ceilings import probes
from e3pruner.profiling.changes import compared, read_profile
from e3pruner.profiling.fit import check_loading_fits
from e3pruner.profiling.model.page import decoder_page
from e3pruner.profiling.model.profile import profile_decoder
from e3pruner.profiling.operations.page import operations_page
from e3pruner.profiling.operations.profile import CASES, DTYPES, PROVIDERS, check_choices, profile_operations
from e3pruner.profiling.page import PAGE_FILE, Page, doubts_of, verdict, write_page
from e3pruner.profiling.recording import trace_page
from e3pruner.profiling.step.page import step_page
from e3pruner.profiling.step.profile import profile_steps
from e3pruner.report import describe_environment
from e3pruner.text.sequences import as_sequences
from e3pruner.text.splits import take, token_splits
from e3pruner.timing import Conditions, watched

app = typer.Typer(name="profile", no_args_is_help=True, help="See where the time and the bytes go.")

_MOST_STEPS = 20

Subject = Annotated[str, typer.Argument(metavar="MODEL", help="As --model elsewhere: a folder, or `smollm2`.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds, at least, in which all take turns.")]
Limit = Annotated[
    float,
    typer.Option(min=0, help="Seconds after which no further round begins, whether every time is known to 2 % or not."),
]
Earlier = Annotated[
    Path | None,
    typer.Option("--compare", help="An earlier profile, its folder or its profile.jsonl: say what changed since."),
]


def finished(page: Page, earlier: list[dict[str, Any]] | None, folder: Path, conditions: Conditions) -> Page:
    """The page as it is written into `folder`, against an `earlier` profile where there is one."""
    page = page if earlier is None else compared(page, earlier)
    write_page(page, folder, describe_environment(), command_line(), conditions)
    return page


def show(page: Page, conditions: Conditions, out: Path) -> None:
    """Prints the page's tables. Only once the result is where it belongs: a pipe may close before they end."""
    terminal = console()
    doubts = doubts_of(page, conditions)
    for line in (verdict(doubts), *(f"- {doubt}" for doubt in doubts), str(conditions), page.summary):
        terminal.print(line, highlight=False, markup=False)
    for section in page.sections:
        for table in section.tables:
            terminal.print(rich_table(table.title, table.headings, table.rows))
    terminal.print(f"{out / PAGE_FILE}", highlight=False, soft_wrap=True)


@app.command("model", cls=Command)
def model(
    ctx: typer.Context,
    model: Subject,
    out: options.Out,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it, one at a time.")] = 16,
    rounds: Rounds = 5,
    limit: Limit = 120,
    removed: Annotated[
        list[int] | None, typer.Option(min=1, help="Measure without so many layers; may be repeated.")
    ] = None,
    speedup: Annotated[float, typer.Option(help="How many layers must go to be this many times as fast?")] = 1.3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    compare: Earlier = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Profile a model by layer and part, and predict what removing layers would buy.

    Example: `e3 profile model smollm2 --dtype bfloat16 --prompt 256 --out profiled`
    """
    if speedup <= 1:
        raise ValueError(f"--speedup {speedup} must be above 1")
    earlier = None if compare is None else read_profile(compare, "whole")
    with result_folder(ctx, out, force) as folder:
        check_loading_fits(model, device, dtype, trust_remote_code=trust_remote_code)
        network = load_model(model, device, dtype, trust_remote_code=trust_remote_code)
        with watched() as conditions:
            profile = profile_decoder(
                network,
                batch=batch,
                prompt=prompt,
                tokens=tokens,
                rounds=rounds,
                limit=limit,
                removed=removed or (4, 8, 12),
                seed=seed,
                folder=folder,
                tried=probes(network.device, (network.dtype,)),
            )
        name = str(network.dtype).removeprefix("torch.")
        title = f"{model}: {profile.layers} layers, {name}, {batch} × {prompt} tokens"
        page = finished(decoder_page(profile, title, name, speedup), earlier, folder, conditions)
    show(page, conditions, out)


@app.command("step", cls=Command)
def step(
    ctx: typer.Context,
    model: Subject,
    out: options.Out,
    drop: options.Drop = None,
    fraction: options.Fraction = None,
    protect: options.Protect = None,
    text: options.Text = None,
    length: options.Length = 256,
    batch: options.Batch = 4,
    rounds: Rounds = 3,
    limit: Limit = 120,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    compare: Earlier = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Profile a step of the mask search and one of the recovery, and both again with losses as a textbook writes them.

    Example: `e3 profile step smollm2 --drop 8 --out profiled`
    """
    check_target(drop=drop, fraction=fraction)
    earlier = None if compare is None else read_profile(compare, "step")
    with result_folder(ctx, out, force) as folder:
        splits = token_splits(
            load_tokenizer(model, trust_remote_code=trust_remote_code), text, length=length, seed=seed
        )
        there = as_sequences(splits.training).input_ids
        wanted = min(len(there), batch * (_MOST_STEPS + 3)) if limit else 0
        sequences = take(there, max(wanted, batch * (rounds + 3)), "--batch")
        check_loading_fits(model, device, dtype, trust_remote_code=trust_remote_code)
        network = load_model(model, device, dtype, trust_remote_code=trust_remote_code)
        with watched() as conditions:
            profile = profile_steps(
                network,
                sequences,
                drop=drop,
                fraction=fraction,
                protect=protect or (),
                batch=batch,
                rounds=rounds,
                limit=limit,
                seed=seed,
                folder=folder,
            )
        title = f"{model}: one search step and one recovery step, {batch} × {length} tokens"
        page = finished(step_page(profile, title), earlier, folder, conditions)
    show(page, conditions, out)


@app.command("trace", cls=Command)
def trace(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="What `with e3kernels.profile(FOLDER):` left.")],
    out: options.Out,
    force: options.Force = False,
) -> None:
    """Make a page of a block that your own program profiled: its ranges, operators and memory.

    Example: `e3 profile trace profiled --out page`
    """
    recorded = Profile(Trace.read(folder / TRACE_FILE))
    with result_folder(ctx, out, force) as target:
        page = trace_page(recorded, f"The block profiled in {folder.name}")
        write_page(page, target, describe_environment(), command_line())
    for line in (page.summary, f"{out / PAGE_FILE}"):
        console().print(line, highlight=False, soft_wrap=True)


@app.command("ops", cls=Command)
def ops(
    ctx: typer.Context,
    out: options.Out,
    op: Annotated[
        list[str] | None, typer.Option(help="An operation; may be repeated. All of them if not given.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="native, triton, reference or eager; may be repeated. All that serve here.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Tokens.")] = 256,
    vocabulary: Annotated[int, typer.Option(min=2, help="Entries of the vocabulary.")] = 49_152,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = 576,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; may be repeated. The first two.")
    ] = None,
    rounds: Rounds = 5,
    limit: Limit = 120,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    compare: Earlier = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Measure every operation beside what this machine can do at most: time, rate, share, host time, error.

    Example: `e3 profile ops --op entropy_kl --rows 2048 --out profiled`
    """
    dtypes = dtype or list(DTYPES)[:2]
    check_choices({"--op": (op, CASES), "--provider": (provider, PROVIDERS), "--dtype": (dtypes, DTYPES)})
    earlier = None if compare is None else read_profile(compare, "operation")
    with result_folder(ctx, out, force) as folder:
        with watched() as conditions:
            found = profile_operations(
                operations=op,
                providers=provider,
                dtypes=dtypes,
                rows=rows,
                vocabulary=vocabulary,
                hidden=hidden,
                device=str(usable_device(device)),
                seed=seed,
                rounds=rounds,
                limit=limit,
                folder=folder,
            )
        page = finished(
            operations_page(found, f"Operations on {rows} tokens, {hidden} wide, {vocabulary:,} entries"),
            earlier,
            folder,
            conditions,
        )
    show(page, conditions, out)
