"""A results file with every part that the report can show."""

from typing import Any

import pytest

from e3pruner.report import describe_environment


def comparison_line(method: str, drop: int) -> dict[str, Any]:
    kl = drop * {"greedy": 0.14, "bi": 0.2, "random": 1.1}[method]
    spread = [kl, 0.9 * kl, 1.2 * kl]
    return {
        "drop": drop,
        "recovery": "none",
        "method": method,
        "seeds": 3,
        "kl": spread,
        "kinds": {kind: {"kl": spread, "perplexity": [50.0, 48.0, 52.0]} for kind in ("manual", "code")},
        "cost": 0.0 if method == "random" else 1e4 * drop,
        "seconds": 12.5,
        "removed": [list(range(drop))] * 3,
    }


def synthetic_results(layers: int = 30, removed: tuple[int, ...] = (12, 13, 14, 15, 16, 17, 18, 26)) -> dict[str, Any]:
    importance = [2.5, 1.4, *(0.03 + 0.011 * ((7 * i) % 13) for i in range(2, layers - 1)), 4.0]
    models = [
        {
            "name": "dense",
            "layers": layers,
            "parameters": 134515008,
            "kl": 0.0,
            "perplexity": 25.7,
            "top1_agreement": 1.0,
        },
        {"name": "pruned", "layers": 22, "parameters": 106e6, "kl": 1.12, "perplexity": 71.2, "top1_agreement": 0.55},
        {
            "name": "recovered",
            "layers": 22,
            "parameters": 106e6,
            "kl": 0.61,
            "perplexity": 36.4,
            "top1_agreement": 0.66,
        },
    ]
    for model, speed in zip(models, (23.6, 31.2, 31.4), strict=True):
        model |= {"decode_tokens_per_s": speed, "prefill_tokens_per_s": 30 * speed}
    return {
        "title": "SmolLM2-135M-Instruct, 30 to 22 layers",
        "summary": "Searched with gumbel-topk, cut, and recovered by distillation from the dense model.",
        "environment": describe_environment(),
        "command": "e3 demo --drop 8",
        "config": {"drop": 8, "seed": 0, "model": None},
        "seconds": {"search": 58.1, "recover": 151.0},
        "layers": layers,
        "removed": list(removed),
        "importance": importance,
        "mask_path": {
            "steps": list(range(100)),
            "removed": [[((i * 5 + s // 9) % 4) / 4 * (i in range(8, 27)) for i in range(layers)] for s in range(100)],
        },
        "methods": [
            {
                "method": "gumbel-topk",
                "removed": list(removed),
                "kl": 1.12,
                "perplexity": 71.2,
                "seconds": 58.1,
                "cost": 61440.0,
            },
            {
                "method": "leave-one-out",
                "removed": [2, 3, 5, 7, 9, 12, 14, 20],
                "kl": 1.19,
                "perplexity": 76.2,
                "seconds": 40,
                "cost": 40960.0,
            },
            {
                "method": "bi",
                "removed": [20, 21, 22, 23, 24, 25, 26, 27],
                "kl": 1.34,
                "perplexity": 87.9,
                "seconds": 2,
                "cost": 2048.0,
            },
        ],
        "curve": {
            "gumbel-topk": [[n, 0.02 * n**1.95] for n in (2, 4, 6, 8)],
            "leave-one-out": [[n, 0.02 * n**2] for n in (2, 4, 6, 8)],
            "bi": [[n, 0.025 * n**2] for n in (2, 4, 6, 8)],
        },
        "frontier": [
            {"drop": n, "ratio": 1.2**n, "parameters": 134e6 - 3.5e6 * n, "decode_tokens_per_s": 20.0 + n}
            for n in (0, 4, 8)
        ],
        "recovery": {
            "train": [[s, 1.1 * 0.97**s + 0.1 * ((s * 7) % 5 - 2) / 2 + 0.3] for s in range(1, 51)],
            "held_out": [[0, 1.12], [25, 0.75], [50, 0.61]],
        },
        "comparison": [comparison_line(method, drop) for drop in (4, 8) for method in ("greedy", "bi", "random")],
        "models": models,
        "generations": [
            {
                "prompt": prompt,
                "answers": {"dense": "Paris & <b>light</b>.", "pruned": "The the Paris", "recovered": "Paris."},
            }
            for prompt in ("What is the capital of France?", "Explain a hash table.", "Write a haiku.")
        ],
    }


@pytest.fixture(scope="session")
def whole_results() -> dict[str, Any]:
    return synthetic_results()


@pytest.fixture
def results() -> dict[str, Any]:
    """One's own copy, to change."""
    return synthetic_results()
