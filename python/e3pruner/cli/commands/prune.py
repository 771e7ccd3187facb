"""e3 prune: a plan applied to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e3pruner import PruningPlan
from e3pruner import prune as prune_model
from e3pruner.card import write_card
from e3pruner.cli import options
from e3pruner.cli.command import command_line, stderr
from e3pruner.cli.config import result_folder
from e3pruner.models.loading import Dtype, checked_folder, copy_tokenizer, load_model, tokenizer_files
from e3pruner.pipelines.publishing import check_access, push
from e3pruner.surgery.adapter import ADAPTER_CONFIG, prune_adapter
from e3pruner.surgery.plan import PLAN_FILE


def prune(
    ctx: typer.Context,
    model: options.Model,
    plan: Annotated[Path, typer.Option(help="The plan: pruning.json of `e3 search`.", exists=True, dir_okay=False)],
    out: options.Out,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of a PEFT adapter of the model: cut along with it, into `adapter` under --out."),
    ] = None,
    dtype: options.DtypeOption = Dtype.AUTO,
    trust_remote_code: options.TrustRemoteCode = False,
    push_to_hub: options.PushToHub = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Cut the layers of a plan out of a model and save a vanilla Hugging Face checkpoint.

    The folder loads with `AutoModelForCausalLM.from_pretrained`, without this package. Files are cut, of any size, with
    a few megabytes of them in memory at a time; a --dtype other than theirs loads the model whole. That the result
    is the model with the layers skipped is checked before it appears. --model may also be a GGUF file, or the folder of
    a PEFT adapter.

    Example: `e3 prune --model smollm2 --plan searched/pruning.json --out pruned`
    """
    chosen = PruningPlan.load(plan)
    if dtype != Dtype.AUTO and (model.endswith(".gguf") or _is_adapter(Path(model))):
        raise ValueError(f"--dtype {dtype}: {model} is cut as files and keeps its bytes; leave it out")
    if adapter is not None and not _is_adapter(adapter):
        raise ValueError(f"--adapter {adapter} holds no {ADAPTER_CONFIG}")
    check_access(push_to_hub)
    with result_folder(ctx, out, force) as folder:
        as_files = model.endswith(".gguf") or _is_adapter(Path(model))
        if dtype != Dtype.AUTO:
            loaded = load_model(model, "cpu", dtype, trust_remote_code=trust_remote_code)
            prune_model(loaded, chosen).save_pretrained(folder)
            copy_tokenizer(model, folder)
            chosen.save(folder / PLAN_FILE)
        else:
            source = Path(model) if as_files else checked_folder(model, trust_remote_code)
            cut = prune_model(source, chosen, out=folder / "cut", trust_remote_code=trust_remote_code)
            for path in sorted(cut.iterdir()):
                path.rename(folder / path.name)
            cut.rmdir()
            if not as_files and not tokenizer_files(model):
                stderr.print(f"{model} has no tokenizer beside it, so {out} has none either")
        if adapter is not None:
            prune_adapter(adapter, chosen, folder / "adapter", base=str(out))
        if not as_files:
            write_card(folder, model, chosen, command_line())
    if push_to_hub is not None:
        push(out, push_to_hub)
    print(f"{out}: {len(chosen.kept)} of {chosen.num_layers} layers kept, removed {chosen.removed}")


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()
