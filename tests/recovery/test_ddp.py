import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_model

from e3pruner import prune

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp.py"


def test_two_processes_equal_one(tmp_path):
    teacher = tiny_model("llama")
    teacher.save_pretrained(tmp_path / "teacher")
    prune(teacher, [0, 1, 4, 5]).save_pretrained(tmp_path / "student")
    tokens = torch.randint(3, VOCAB_SIZE, (16, 12), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, tmp_path / "tokens.safetensors")
    trained = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        paths = ["--student", tmp_path / "student", "--teacher", tmp_path / "teacher"]
        paths += ["--tokens", tmp_path / "tokens.safetensors", "--out", out, "--steps", "3", "--lr", "1e-3"]
        subprocess.run([*launch, EXAMPLE, *paths], check=True, timeout=240)
        trained.append(load_file(out / "model.safetensors"))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-5)
    before = load_file(tmp_path / "student" / "model.safetensors")
    assert all(not torch.equal(before[name], weight) for name, weight in trained[0].items())
