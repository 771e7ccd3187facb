"""e3 cache-teacher: the teacher's predictions on disk."""

from __future__ import annotations

import shutil
from enum import StrEnum
from typing import Annotated

import typer

import e3pruner
from e3pruner.cli import options
from e3pruner.cli.command import stderr
from e3pruner.cli.config import result_folder
from e3pruner.models import output_head
from e3pruner.models.loading import load_model, load_tokenizer
from e3pruner.recovery.cache import cache_bytes
from e3pruner.recovery.stored import DEFAULT_K
from e3pruner.text.splits import token_splits
from e3pruner.vocabulary import check_positive


class StoreOption(StrEnum):
    TOPK = "topk"
    HIDDEN = "hidden"
    HIDDEN_INT8 = "hidden-int8"


def cache_teacher(
    ctx: typer.Context,
    out: options.Out,
    teacher: options.Teacher = None,
    verify: Annotated[bool, typer.Option("--verify", help="Make nothing: read all of --out and check it.")] = False,
    store: Annotated[
        StoreOption, typer.Option(help="The likeliest tokens, or the hidden states of the full vocabulary.")
    ] = StoreOption.TOPK,
    k: Annotated[
        int | None, typer.Option(min=1, help="Likeliest next tokens to store for each position.", show_default="10")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the predictions, and of the training.")] = 1.0,
    vocabulary: options.Vocabulary = None,
    text: options.Text = None,
    length: options.Length = 256,
    batch: options.Batch = 8,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    placement: options.PlacementOption = options.Placement.WHOLE,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Store what a teacher predicts on the training text, so that `e3 distill --teacher-cache` needs no teacher.

    Says first what it will take on disk: with k = 10 some 60 bytes per token, 40 for vocabularies up to 65,536; of
    hidden states two bytes per number, one as int8, and the teacher's head beside them. An interrupted or killed run
    goes on from the last whole shard.

    Examples:

    `e3 cache-teacher --teacher smollm2 --text my.txt --out cache`

    `e3 cache-teacher --teacher my-70b --placement stream --store hidden --out cache`

    `e3 cache-teacher --verify --out cache`
    """
    if verify:
        cache = e3pruner.TeacherCache(out)
        cache.verify()
        print(f"{out}: every shard is what was written; {cache.manifest['sequences']} sequences")
        return
    if teacher is None:
        raise typer.BadParameter("is needed, unless --verify checks what is there", param_hint="--teacher")
    if store != StoreOption.TOPK and k is not None:
        raise typer.BadParameter(f"is of --store topk; {store} keeps the whole vocabulary", param_hint="--k")
    check_positive("temperature", temperature)
    with result_folder(ctx, out, force) as folder:
        tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
        tokens = token_splits(tokenizer, text, length=length, seed=seed).training
        model = load_model(teacher, device, dtype, placement=placement, trust_remote_code=trust_remote_code)
        need = cache_bytes(len(tokens), length, output_head(model), store.value, k)
        free = shutil.disk_usage(folder).free
        stderr.print(
            f"{len(tokens) * length:,} tokens, {need / (len(tokens) * length):.1f} bytes each: {need:,} bytes of "
            f"{free:,} free"
        )
        e3pruner.cache_teacher(
            model,
            tokens,
            folder,
            tokenizer=tokenizer,
            store=store.value,
            k=k,
            vocabulary=vocabulary,
            temperature=temperature,
            batch_size=batch,
            force=True,
        )
    kept = f"the {k or DEFAULT_K} likeliest next tokens" if store == StoreOption.TOPK else "the hidden state"
    print(f"{out}: {len(tokens)} sequences of {length} tokens, {kept} of each position")
