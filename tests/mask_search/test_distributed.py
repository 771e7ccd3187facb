"""The same search on two processes, each with half of every batch, as on one with all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import tiny_model, tiny_tokens

import e3pruner
from e3pruner.surgery import PruningPlan

PROGRAM = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
import torch
import torch.distributed as dist
from pathlib import Path
from tiny_models import tiny_model, tiny_tokens
import e3pruner
from e3pruner.mask_search.problem import SearchProblem

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(os.environ["FOLDER"])
shares = [tiny_tokens(2, 12, seed)[rank : rank + 1] for seed in range(3)]

def search(method, **changes):
    arguments = {"drop": 3, "seed": 5, "progress": False, "precision": "fp32"} | changes
    return e3pruner.search(tiny_model("llama"), shares, method=method, **arguments)

def refused(name, **changes):
    try:
        search("greedy", **changes)
    except RuntimeError as error:
        (folder / f"{name}-{rank}.txt").write_text(str(error))

for method in ("gumbel-topk", "greedy", "taylor"):
    search(method, checkpoint=folder / f"{method}.json").save(folder / f"{method}-{rank}.plan.json")
refused("seed", seed=5 + rank)
# A rank that would take another way, for whatever reason: its masks are not those of the others.
mask = SearchProblem.mask
SearchProblem.mask = lambda problem, removed: mask(problem, [*removed[:-1], (removed[-1] + rank) % 6])
refused("mask")
dist.destroy_process_group()
"""
METHODS = ("gumbel-topk", "greedy", "taylor")
DISAGREEMENTS = {"seed": "the arguments of rank 1 differ", "mask": "the masks of rank 1 differ"}


def test_two_processes_search_as_one_and_raise_where_they_part(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = {"TESTS": str(Path(__file__).parents[1]), "FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command.append(str(tmp_path / "program.py"))
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        check_plans(tmp_path, method)
        stored = json.loads((tmp_path / f"{method}.json").read_text())
        assert stored["measured"]
        assert len(stored["identity"]["tokens"]) == 2 * 3  # of both ranks: neither resumes on other text
    for name, message in DISAGREEMENTS.items():
        for rank in range(2):
            assert message in (tmp_path / f"{name}-{rank}.txt").read_text()


def check_plans(folder, method):
    first, second = (PruningPlan.load(folder / f"{method}-{rank}.plan.json") for rank in range(2))
    assert first == second
    batches = [tiny_tokens(2, 12, seed) for seed in range(3)]
    arguments = {"drop": 3, "seed": 5, "progress": False, "precision": "fp32"}
    one = e3pruner.search(tiny_model("llama"), batches, method=method, **arguments)
    assert first.removed == one.removed
    assert [record["removed"] for record in first.history] == [record["removed"] for record in one.history]
    for name, value in one.metrics.items():
        assert first.metrics[name] == pytest.approx(value, rel=1e-5), name


def test_where_one_share_is_refused_no_rank_waits_for_another(tmp_path):
    model = tiny_model("llama")

    def compare():
        first = dist.get_rank() == 0
        share = tiny_tokens(1, 12) if first else tiny_tokens(1, 12) + 99
        error, message = (RuntimeError, "token_batches of rank 1 cannot") if first else (ValueError, "holds token")
        with pytest.raises(error, match=message):
            e3pruner.search(model, [share], drop=2, method="bi", progress=False)

    on_ranks(2, compare, tmp_path)
