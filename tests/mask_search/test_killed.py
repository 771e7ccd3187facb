"""SIGKILL at any point of a search: the next call goes on from the checkpoint to the same plan, bit for bit."""

import json
import random
import subprocess
import sys
from pathlib import Path

from tiny_models import tiny_model, tiny_tokens

import e3pruner

# One process imports, then forks for every life of the search: a child that is to die counts what it measures, the
# files it renames included, and kills itself on the way.
PROGRAM = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from tiny_models import tiny_model, tiny_tokens
import e3pruner
from e3pruner.mask_search import measurements
from pathlib import Path

def counted(function, clock):
    def ticking(*args, **kwargs):
        clock[0] -= 1
        if clock[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return ticking

def live(folder, method, options, ticks):
    measurements._SECONDS = 0.0  # after every measurement
    if ticks:
        clock = [ticks]
        known = measurements.Measurements
        known.add = counted(known.add, clock)
        Path.replace = counted(Path.replace, clock)
    batches = [tiny_tokens(seed=seed) for seed in range(2)]
    plan = e3pruner.search(
        tiny_model("llama"), batches, 3, method, 5, checkpoint=f"{folder}/search.json", progress=False, **options)
    plan.save(f"{folder}/plan.json")

for folder, method, options, lives in json.loads(sys.argv[1]):
    ends = []
    for ticks in [*lives, 0]:
        child = os.fork()
        if child == 0:
            try:
                live(folder, method, options, ticks)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))
"""
SEARCHES = {"gumbel-topk": {}, "greedy": {}, "straight-through": {"steps": 8}}


def test_a_killed_search_ends_with_the_same_plan(tmp_path):
    points = random.Random(20261122)
    jobs = [
        (str(tmp_path / method), method, options, [points.randint(1, 12) for _ in range(2)])
        for method, options in SEARCHES.items()
    ]
    for folder, *_ in jobs:
        Path(folder).mkdir()
    tests = str(Path(__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {tests!r})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program, json.dumps(jobs)], capture_output=True, text=True, check=True)
    for (folder, method, options, _), line in zip(jobs, done.stdout.splitlines(), strict=True):
        ends = json.loads(line)
        assert ends[0] == -9, method
        assert ends[-1] == 0, method
        batches = [tiny_tokens(seed=seed) for seed in range(2)]
        plan = e3pruner.search(tiny_model("llama"), batches, 3, method, 5, progress=False, **options)
        plan.save(tmp_path / "plan.json")
        assert (Path(folder) / "plan.json").read_bytes() == (tmp_path / "plan.json").read_bytes(), method
