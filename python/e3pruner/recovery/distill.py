"""Recovery: train a pruned model to predict what its teacher predicts."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.models import output_head
from e3pruner.models.stack import check_unquantised
from e3pruner.models.vocabulary import tokenizer_size
from e3pruner.precision import autocast_dtype
from e3pruner.recovery.loop import DistillResult, Training
from e3pruner.recovery.loss import DistillLoss
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.state import StateFolder
from e3pruner.recovery.student import refuse_shared_weights, trained_parameters
from e3pruner.recovery.teacher import LiveTeacher, Teacher, narrowed
from e3pruner.recovery.tracking import check_tracker, opened_tracker
from e3pruner.storage import content_digest, fingerprint, locked
from e3pruner.surgery import PruningPlan
from e3pruner.text.given import Given, sequences_of


def distill(
    pruned: PreTrainedModel,
    *,
    teacher: PreTrainedModel | Teacher,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Given,
    held_out: Given | None = None,
    plan: PruningPlan | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    track: str | None = None,
    track_folder: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> DistillResult:
    """Train `pruned`, in place, on the divergence of its predictions from those of `teacher`.

    `data` and `held_out`: as the token batches of `e3pruner.search`; padding, and what labels leave out, is not learnt.
    `plan`: by which `pruned` was cut, for trainable="cuts". `tokenizer`: the one that both models share, which proves
    what of vocabularies of different sizes is padding (see `DistillOptions.vocabulary`). `options`: those of
    `DistillOptions`. AdamW runs on fp32 master weights, without dropout; the weights end in the dtype they came in,
    those with requires_grad=False untrained. A step minimises Σwℓ / Σw over all its tokens, however
    `batch_size · accumulation` is split.

    With `output`, a folder, states are saved there every `save_every` steps, on Ctrl-C, when the loss is no longer
    finite, and at the end; `resume=True` goes on from the last one to the same bits as an uninterrupted run.

    `track` shows the curves meanwhile: "tensorboard" (event files in `track_folder`, else in `output`), "wandb" or
    "trackio". A resumed run goes on with the same curves. `progress`: show a bar on standard error.

    Raises ValueError for an illegal option or token, a teacher with a vocabulary of another size that is not known to
    be padding, or with weights shared with `pruned`, a student that is frozen wherever `trainable` points, a damaged
    state, a resume with other options, data or teacher; FileExistsError if `output` is not empty and neither `resume`
    nor `force` is given; ModuleNotFoundError if the package that `track` names is not installed; FloatingPointError
    naming the step whose loss or gradient is not finite, which then has changed no weight; KeyboardInterrupt after
    Ctrl-C, once the state is saved.
    """
    chosen = DistillOptions(**options)
    if resume and output is None:
        raise ValueError("resume=True needs output: the folder of the run to resume")
    check_tracker(track)
    check_unquantised("pruned", pruned, "to train it, load it dequantised, in bfloat16 or float32")
    events = output if track_folder is None else track_folder
    if track == "tensorboard" and events is None:
        raise ValueError("track='tensorboard' needs track_folder or output: a folder for its event files")
    dtype = autocast_dtype(chosen.precision, pruned.device)
    if isinstance(teacher, PreTrainedModel):
        refuse_shared_weights(pruned, teacher)
        source: Teacher = LiveTeacher(teacher, dtype)
        casts: AbstractContextManager[None] = narrowed(teacher, dtype)
    else:
        source, casts = teacher, nullcontext()
    loss = DistillLoss(pruned, source, chosen, dtype, tokenizer_size(tokenizer))
    models = {"teacher": teacher} if isinstance(teacher, PreTrainedModel) else {}
    models["pruned"] = pruned
    sequences = sequences_of("data", data, loss.vocabulary, **models)
    source.check(sequences, chosen.temperature)
    watched = None if held_out is None else sequences_of("held_out", held_out, loss.vocabulary, **models)
    steps = chosen.steps or math.ceil(len(sequences) / (chosen.batch_size * chosen.accumulation))
    # What "one pass" and "auto" came to is part of the run: other data or another machine would change it.
    settings = asdict(chosen) | {
        "steps": steps,
        "vocabulary": None if loss.vocabulary == output_head(pruned).weight.shape[0] else loss.vocabulary,
        "precision": str(dtype or torch.float32),
        "data": sequences.identity,
        "teacher": source.identity,
    }
    alone = nullcontext() if output is None else locked(output)
    with alone, casts, trained_parameters(pruned, chosen, plan, dtype) as parameters:
        folder = None if output is None else StateFolder(output, resume=resume, force=force)
        frozen = {n: p for n, p in pruned.named_parameters() if n not in parameters}
        settings["frozen weights"] = content_digest([frozen])
        training = Training(loss, parameters, sequences, watched, steps, settings)
        if folder is not None and resume:
            training.restore(folder)
        first = training.result.steps + 1 if resume else 0
        with opened_tracker(track, events, fingerprint(settings)[:16], first) as tracker:
            return training.run(folder, tracker, progress)
