"""e3 search: which layers may go."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

import e3pruner
from e3pruner import pipelines
from e3pruner.cli import options
from e3pruner.cli.command import command_line
from e3pruner.cli.config import name_or_pairs, parse_options, resolved, result_folder
from e3pruner.cli.tables import print_table
from e3pruner.evaluation.target import check_target, number_to_drop
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.healed import RUNGS, parse_rungs
from e3pruner.mask_search.search import OBJECTIVES
from e3pruner.mask_search.units import GRANULARITIES
from e3pruner.models.loading import load_model, load_tokenizer
from e3pruner.pipelines.frontier import frontier_results, parse_drops, save_frontier, usual_drops
from e3pruner.pipelines.results import run_results, search_results
from e3pruner.pipelines.settings import check_search
from e3pruner.report import build_report, save_results
from e3pruner.surgery.engines import engine_named
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.kinds import unseen_text
from e3pruner.text.sequences import as_sequences
from e3pruner.text.splits import batches, take, token_splits
from e3pruner.vocabulary import check_choice, check_positive

CHECKPOINT = "search.checkpoint.json"


def _one_or_several(given: Any) -> int | list[int]:
    """What `--drop` and a file's `drop` say."""
    try:
        drops = parse_drops(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return drops[0] if len(drops) == 1 else drops


def search(
    ctx: typer.Context,
    model: options.Model,
    out: options.Out,
    drop: Annotated[
        Any,
        typer.Option(
            parser=_one_or_several,
            metavar="INTEGER,...",
            help="Number of layers to remove, or several: 4,8,12. 8 where no other target is given.",
        ),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Remove an eighth, a quarter, three eighths and half of the layers.")
    ] = False,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Of several numbers of layers, the largest that raises perplexity at most so."),
    ] = None,
    unseen: Annotated[
        str | None,
        typer.Option(help="With several: text of another kind to judge on: manual, code, ... or a file."),
    ] = None,
    held_out: options.HeldOut = 16,
    speed: options.Speed = True,
    fraction: options.Fraction = None,
    parameters: Annotated[float | None, typer.Option(help="Parameters to be left at most, instead of --drop.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Milliseconds a decoded token may take, measured here, instead of --drop.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "gumbel-topk",
    protect: options.Protect = None,
    granularity: Annotated[str, typer.Option(help="layer; or sublayer: attentions and MLPs one by one.")] = "layer",
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=NUMBER|ENGINE",
            help="How many of a kind of layer go, such as sliding_attention=6; or an engine, such as llama.cpp: what "
            "stays keeps to the kinds that it fixes by index.",
        ),
    ] = None,
    text: options.Text = None,
    sequences: options.Sequences = 16,
    length: options.Length = 256,
    batch: options.Batch = 4,
    search: options.Search = None,
    objective: Annotated[
        str, typer.Option(help="raw: the cut model's divergence; healed: what is left of it after a short recovery.")
    ] = "raw",
    rungs: Annotated[
        str, typer.Option(help="With healed: MASKSxTOKENS,...: so many masks are recovered on so many tokens.")
    ] = RUNGS,
    recover: Annotated[list[str] | None, options.recover_option("--recover")] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    placement: options.PlacementOption = options.Placement.WHOLE,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Search the layers whose removal changes the model's predictions least, and write the plan as pruning.json.

    Examples:

    `e3 search --model smollm2 --drop 8 --out searched`

    `e3 search --model my-model --text my.txt --method greedy --protect 0 --protect 1 --out searched`

    `e3 search --model smollm2 --drop 4,8,12 --unseen library --max-perplexity-ratio 3 --out searched`

    `e3 search --model smollm2 --latency 60 --out searched`

    `e3 search --model smollm2 --granularity sublayer --drop 12 --out searched`

    `e3 search --model smollm2 --objective healed --rungs 8x4096,4x8192 --out searched`

    `e3 search --model my-gemma --quota llama.cpp --drop 6 --placement stream --out searched`
    """
    extra, kinds, protected = parse_options(search, "--search"), name_or_pairs(quota, "--quota"), protect or []
    if isinstance(kinds, str):
        engine_named(kinds)
    check_search(method, extra)
    check_choice("objective", objective, OBJECTIVES)
    parse_rungs(rungs)
    healing: dict[str, Any] = {"objective": objective}
    if objective == "healed":
        healing |= {"rungs": rungs, "recover": parse_options(recover, "--recover")}
    elif recover:
        raise ValueError("--recover is of --objective healed")
    check_choice("granularity", granularity, GRANULARITIES)
    drops = parse_drops(drop)
    several = frontier or len(drops) > 1
    number = drops[0] if drops and not several else None
    targets = {"drop": number, "fraction": fraction, "parameters": parameters, "milliseconds": latency}
    check_target(**targets)
    if several and (granularity != "layer" or quota or (frontier and drops) or any(targets.values())):
        raise ValueError("--frontier and --drop 4,8,12 count whole layers, and stand for every other target")
    if not several and (max_perplexity_ratio is not None or unseen is not None):
        raise ValueError("--max-perplexity-ratio and --unseen choose between several numbers of layers: --drop 4,8,12")
    if max_perplexity_ratio is not None:
        check_positive("max_perplexity_ratio", max_perplexity_ratio)
    with result_folder(ctx, out, force) as folder:
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        splits = token_splits(tokenizer, text, length=length, seed=seed)
        calibration = batches(take(splits.calibration, sequences, "--sequences"), batch)
        if objective == "healed":
            healing["training"] = splits.training
        network = load_model(model, device, dtype, placement=placement, trust_remote_code=trust_remote_code)
        checkpoint = folder / CHECKPOINT
        if several:
            judged = batches(take(splits.held_out, held_out, "--held-out"), batch)
            elsewhere = None
            if unseen is not None:
                seen = [as_sequences(rows).input_ids for rows in (splits.calibration, splits.training)]
                rows = unseen_text(tokenizer, unseen, length=length, held_out=held_out, seen=seen)
                elsewhere = list(rows.split(batch))
            shared = {"seed": seed, "protect": protected, "checkpoint": checkpoint, **healing, **extra}
            drops = drops or usual_drops(network, protected)
            dense, points = pipelines.frontier(
                network, calibration, drops, judged, elsewhere, method=method, speed=speed, **shared
            )
            save_frontier(folder, points, max_perplexity_ratio)
            title = f"{model}: {len(points)} depths by {method}"
            about = run_results(title, resolved(ctx)) | {"command": command_line()}
            save_results(about | frontier_results(dense, points), folder)
            build_report(folder)
            checkpoint.unlink()
            print_table(about | frontier_results(dense, points))
            return
        sublayers, counts = granularity == "sublayer", kinds if isinstance(kinds, dict) else None
        plan = e3pruner.search(
            network,
            calibration,
            number_to_drop(network, protected, quota=counts, sublayers=sublayers, **targets),
            method,
            seed,
            protected,
            granularity=granularity,
            quota=kinds,
            checkpoint=checkpoint,
            **healing,
            **extra,
        )
        plan.save(folder / PLAN_FILE)
        title = f"{model}: {plan.num_layers} to {len(plan.kept)} layers by {method}"
        about = run_results(title, resolved(ctx)) | {"command": command_line()}
        save_results(about | search_results(plan), folder)
        checkpoint.unlink()
    parts = "".join(f", {kind} of {layers}" for kind, layers in plan.sublayers.items() if layers)
    after = f", {plan.metrics['healed_kl']:.3f} after a recovery" if objective == "healed" else ""
    Console(highlight=False, soft_wrap=True).print(
        f"{out / PLAN_FILE}: remove {plan.removed}{parts}; "
        f"KL {plan.metrics['kl']:.3f} nats per token on the calibration text{after}"
    )
