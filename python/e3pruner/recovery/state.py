"""Saved states of a training run: one safetensors file and the JSON that names it, replaced together or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from e3pruner.form import natural
from e3pruner.storage import content_digest, read_checked, remove_temporaries, write_checked, write_tensors

STATE = "state.json"
KIND = "e3pruner.training-state 2"
_RECORDS = [{str: float}]
FORM = {
    "step": natural,
    "settings": {str: object},
    "result": {"steps": natural, "tokens": natural, "seconds": float, "curve": _RECORDS, "held_out": _RECORDS},
    "tensors": str,
}


def going_on(output: Path) -> dict[str, Any]:
    """`distill`'s arguments for a folder that is the caller's own: from its last state on, or from the beginning."""
    resume = (output / STATE).exists()
    return {"output": output, "resume": resume, "force": not resume}


class StateFolder:
    """Folder of one run. The JSON is written last: until then the previous state stands.

    Raises FileExistsError if the folder is not empty and neither `resume` nor `force` is given, FileNotFoundError if
    there is none to resume.
    """

    def __init__(self, path: str | Path, *, resume: bool, force: bool) -> None:
        self.path = Path(path)
        self.file = self.path / STATE
        if resume and not self.file.exists():
            raise FileNotFoundError(f"resume: {self.file} does not exist; start without resume")
        if not resume and not force and self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(f"output={self.path} is not empty; resume the run in it, choose another, or force")
        self.path.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.path)

    def save(self, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """`content`: JSON, in which "step" is the number of the state."""
        file = self._tensors_file(content)
        write_tensors(file, tensors)
        write_checked(self.file, KIND, content | {"tensors": content_digest([tensors])})
        for old in self.path.glob("state-*.safetensors"):
            if old != file:
                old.unlink()

    def read(self) -> dict[str, Any]:
        """The JSON part. Raises ValueError if it is damaged or of another format."""
        try:
            return read_checked(self.file, KIND, FORM)
        except ValueError as error:
            raise ValueError(f"{error}; start again with force") from error

    def tensors(self, content: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors that belong to `content`. Raises ValueError if their file is missing or damaged."""
        file = self._tensors_file(content)
        try:
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is missing or damaged ({error}); start again with force") from error
        if content_digest([tensors]) != content["tensors"]:
            raise ValueError(f"{file} is damaged: it is not what was saved; start again with force")
        return tensors

    def _tensors_file(self, content: dict[str, Any]) -> Path:
        return self.path / f"state-{content['step']:08d}.safetensors"


def pack_state(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"parameter/{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if p in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[p][moment]
    return tensors


def unpack_state(
    tensors: dict[str, Tensor], step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put a saved state back in place. Raises ValueError, before anything changes, if it is not of these parameters."""
    stored = {name.partition("/")[2]: tuple(t.shape) for name, t in tensors.items() if name.startswith("parameter/")}
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    if stored != wanted:
        other = sorted(set(stored.items()) ^ set(wanted.items()))[0]
        raise ValueError(f"the saved state is of another model: {other[0]} {other[1]} is not in both")
    for name, p in parameters.items():
        with torch.no_grad():
            p.copy_(tensors[f"parameter/{name}"])
        if step:
            moments = {m: tensors[f"{m}/{name}"].to(p.device) for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
