"""Is there a better mask near that of a method? Exchanges of layers around it, judged on held-out text.

python bench/search/exchanges.py bench/search/depths.yaml --compared compared/depths [--method greedy] [--drop 8]

For each seed of a finished comparison: every exchange of one removed layer for a kept one, then two such exchanges at
once, those whose single effects promise most, are measured on a few batches of held-out text; the best of them on the
even batches of it. What is best there is judged on the odd ones, which chose nothing, and on all the calibration text
there is: a search sees a part of that and nothing of the held-out text. -> exchanges-DROP.json in the folder of the
comparison
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from e3pruner.models import find_layers
from e3pruner.pipelines.comparison import CELLS_FILE, Comparison, KnownText, read_rows
from e3pruner.report import describe_environment
from e3pruner.storage import write_json

SCREENING = 2  # batches of each kind
DOUBLES = 200
FINALISTS = 8

Removed = frozenset[int]


class Texts:
    """KL of masks on batches of several texts; what it has measured the comparison's folder keeps."""

    def __init__(self, comparison: Comparison, drop: int, texts: list[KnownText]) -> None:
        self.texts = texts
        self.problems = [comparison.problem(text, drop) for text in texts]

    def kl(self, masks: list[Removed], batches: slice) -> list[float]:
        """The mean over texts, each over its batches in `batches`."""
        table = []
        for text, problem in zip(self.texts, self.problems, strict=True):
            numbers = range(len(problem.batches))[batches]
            try:
                with problem:
                    table.append(problem.score([problem.mask(sorted(removed)) for removed in masks], numbers))
            finally:
                text.store.save()
        return [sum(column) / len(table) for column in zip(*table, strict=True)]


def exchanges(held_out: Texts, calibration: Texts, removed: Removed, layers: int) -> dict[str, Any]:
    """The best mask one or two exchanges away, found on one half of the held-out text and judged on the other."""
    screening = slice(0, 2 * SCREENING, 2)
    swaps = list(product(removed, sorted(set(range(layers)) - removed)))
    singles = [removed - {back} | {gone} for back, gone in swaps]
    promise = dict(zip(swaps, held_out.kl(singles, screening), strict=True))
    apart = [(a, b) for a, b in combinations(swaps, 2) if a[0] != b[0] and a[1] != b[1]]
    apart.sort(key=lambda pair: promise[pair[0]] + promise[pair[1]])
    # Two pairs of exchanges lead to each mask; it comes where the more promising one stands.
    doubles = list(dict.fromkeys(removed - {a[0], b[0]} | {a[1], b[1]} for a, b in apart))[:DOUBLES]
    screened = singles + doubles
    found = dict(zip(screened, list(promise.values()) + held_out.kl(doubles, screening), strict=True))
    finalists = sorted(found, key=found.__getitem__)[:FINALISTS]
    chosen = dict(zip(finalists, held_out.kl(finalists, slice(0, None, 2)), strict=True))
    winner = min(chosen, key=chosen.__getitem__)
    pair = [removed, winner]
    (own, other), (own_seen, other_seen) = held_out.kl(pair, slice(1, None, 2)), calibration.kl(pair, slice(None))
    return {
        "removed": sorted(removed),
        "measured": len(screened),
        "best_exchange": sorted(winner),
        "kl": own,
        "kl_of_exchange": other,
        "ratio": other / own,
        "calibration_ratio": other_seen / own_seen,
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--compared", type=Path, required=True, help="the folder of the finished comparison")
    parser.add_argument("--method", default="greedy")
    parser.add_argument("--drop", type=int, default=8)
    given = parser.parse_args(arguments)
    rows = read_rows(given.compared / CELLS_FILE)
    rows = [row for row in rows if row["method"] == given.method and row["drop"] == given.drop]
    if not rows:
        parser.error(f"{given.compared} has no cell of {given.method} with {given.drop} layers removed")
    comparison = Comparison.from_yaml(given.matrix, given.compared)
    texts = comparison.texts[""]  # of a comparison that leaves no kind out in turn
    held_out = Texts(comparison, given.drop, [comparison.known(tokens) for tokens in texts.held_out.values()])
    calibration = Texts(comparison, given.drop, [comparison.known(texts.calibration)])
    layers = len(find_layers(comparison.model))
    masks = sorted({tuple(sorted(row["removed"])) for row in rows})
    tried = track(masks, "exchanges", console=Console(stderr=True))
    found = [exchanges(held_out, calibration, frozenset(mask), layers) for mask in tried]
    for each in found:
        print(each)
    about = {"command": shlex.join(["python", "bench/search/exchanges.py", *arguments])}
    results = about | {"method": given.method, "drop": given.drop, "masks": found}
    write_json(given.compared / f"exchanges-{given.drop}.json", results | {"environment": describe_environment()})


if __name__ == "__main__":
    main(sys.argv[1:])
