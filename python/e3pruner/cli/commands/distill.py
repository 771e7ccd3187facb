"""e3 distill: recovery of a pruned model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import e3pruner
from e3pruner.card import recovery_sentence, write_card
from e3pruner.cli import options
from e3pruner.cli.command import command_line
from e3pruner.cli.config import parse_options, resolved, result_folder
from e3pruner.models.loading import load_model, load_tokenizer, model_folder
from e3pruner.pipelines.publishing import check_access, push
from e3pruner.pipelines.results import recovery_results, run_results
from e3pruner.pipelines.settings import check_recover
from e3pruner.recovery import TeacherCache
from e3pruner.recovery.state import STATE, going_on
from e3pruner.recovery.tracking import TRACKED
from e3pruner.report import save_results
from e3pruner.surgery import PruningPlan
from e3pruner.surgery.plan import PLAN_FILE
from e3pruner.text.splits import take, token_splits

TRAINING = "training"


def distill(
    ctx: typer.Context,
    model: options.Model,
    out: options.Out,
    teacher: options.Teacher = None,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(help="Folder of `e3 cache-teacher`, made with the same text, length and seed: no teacher then."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="The plan of --model, for --recover trainable=cuts.", exists=True, dir_okay=False),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; one pass over the text if not given.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    text: options.Text = None,
    length: options.Length = 256,
    held_out: options.HeldOut = 16,
    batch: options.Batch = 4,
    vocabulary: options.Vocabulary = None,
    recover: options.Recover = None,
    track: options.Track = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.SavedDtype = options.Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    push_to_hub: options.PushToHub = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Train a pruned model to predict what its teacher predicts, and save a vanilla Hugging Face checkpoint.

    States are saved on the way, so an interrupted run goes on to the same weights. Everything that
    `e3pruner.distill` takes can be given as --recover: weighting, kd_ratio, temperature, trainable, precision, ...

    Examples:

    `e3 distill --model pruned --teacher smollm2 --steps 50 --out recovered`

    `e3 distill --model pruned --teacher-cache cache --text my.txt --recover save_every=20 --out recovered`
    """
    if (teacher is None) == (teacher_cache is None):
        raise typer.BadParameter("give one of them", param_hint="--teacher, --teacher-cache")
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "batch_size": batch, "seed": seed, "vocabulary": vocabulary}
    settings |= parse_options(recover, "--recover")
    check_recover(settings, track)
    chosen = PruningPlan.load(plan) if plan else None
    check_access(push_to_hub)
    of_model = model_folder(model) / PLAN_FILE
    made_by = chosen or (PruningPlan.load(of_model) if of_model.is_file() else None)
    with result_folder(ctx, out, force) as folder:
        tokenizer = load_tokenizer(teacher or model, trust_remote_code=trust_remote_code)
        source: Any = (
            TeacherCache(teacher_cache, tokenizer=tokenizer)
            if teacher_cache
            else load_model(str(teacher), device, trust_remote_code=trust_remote_code)
        )
        tokens = token_splits(tokenizer, text, length=length, seed=seed)
        evaluated = take(tokens.held_out, held_out, "--held-out")
        student = load_model(model, device, dtype, trust_remote_code=trust_remote_code)
        training = folder / TRAINING
        result = e3pruner.distill(
            student,
            teacher=source,
            tokenizer=tokenizer,
            data=tokens.training,
            held_out=evaluated,
            plan=chosen,
            **going_on(training),
            track=track,
            track_folder=folder / TRACKED,
            **settings,
        )
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        title = f"{model}, distilled from {teacher or teacher_cache}"
        about = run_results(title, resolved(ctx)) | {"command": command_line()}
        save_results(about | recovery_results(result), folder)
        if made_by is not None:
            made_by.save(folder / PLAN_FILE)
        how = recovery_sentence(str(teacher or teacher_cache), text, result.steps)
        figures = [{"name": "recovered", **result.held_out[-1]}]
        write_card(folder, model, made_by, command_line(), recovered=how, figures=figures)
        # The state first: should the rest be cut short, the same command trains again instead of finding half of it.
        (training / STATE).unlink()
        shutil.rmtree(training)
    if push_to_hub is not None:
        push(out, push_to_hub)
    last = result.held_out[-1]
    divergence = f"KL {last['kl']:.3f}, " if "kl" in last else ""
    print(f"{out}: held-out {divergence}perplexity {last['perplexity']:.2f} after {result.steps} steps")
