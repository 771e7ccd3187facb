"""The way of a checkpoint to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from e3pruner.models.loading import HUB_ID

# What a run keeps beside a checkpoint: with paths of this machine, or of no use elsewhere.
NOT_PUBLISHED = ["e3.yaml", "results.json", "report*", "plots/*", "tensorboard/*", "training/*", "*.log", ".*"]


def check_access(repository: str | None) -> None:
    """Before the work: raises ValueError where `repository` is no Hub id or the Hub would not take it from here."""
    if repository is None:
        return
    if not HUB_ID.fullmatch(repository) or "@" in repository:
        raise ValueError(f"--push-to-hub {repository} must be a Hub id, OWNER/NAME")
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(
            f"--push-to-hub {repository}: the Hub cannot be written to ({type(error).__name__}); leave the option out, "
            f"and later, after `hf auth login`: `hf upload {repository} OUT`"
        ) from error


def push(folder: Path, repository: str) -> None:
    """Uploads the checkpoint in `folder`, without what a run keeps beside it, to the Hub."""
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=NOT_PUBLISHED)
