"""Models whose configuration says `return_dict=False`, which many of transformers' own cannot run with."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model, tiny_tokens

import e3pruner
from e3pruner.evaluation.latency import latency
from e3pruner.recovery import cache_teacher
from e3pruner.recovery.integrations.step import DistillStep, batch_of
from e3pruner.text.writer import write_documents

KEPT = [0, 2, 5]
TOKENS = tiny_tokens(4, 10)


def weights(model):
    return dict(model.named_parameters())


def evaluate(model, other):
    return e3pruner.evaluate(model, [TOKENS], teacher=other, progress=False)


def search(model, _):
    options = {"method": "gumbel-topk", "steps": 2, "progress": False, "precision": "fp32"}
    return e3pruner.search(model, [TOKENS], drop=2, **options).removed


def distill(model, other):
    e3pruner.distill(model, teacher=other, data=TOKENS, steps=1, batch_size=2, precision="fp32")
    return weights(model)


def distill_step(model, other):
    step = DistillStep(model, other)
    step.backward_loss(model, batch_of({"input_ids": TOKENS}))[0].backward()
    step.finish(model.parameters())
    return {name: parameter.grad for name, parameter in weights(model).items()}


def prune(model, _):
    return weights(e3pruner.prune(model, KEPT))


def write(model, _):
    return write_documents(model, [[3, 4]], length=6, end=2, seed=0)


def generate(model, _):
    runtime = e3pruner.LayerSkipRuntime(model, keep=KEPT)
    return model.generate(TOKENS, max_new_tokens=3, custom_generate=runtime, do_sample=False)


DOES: list[Callable] = [evaluate, search, distill, distill_step, prune, write]


@pytest.mark.parametrize(
    ("model_type", "does"),
    [(kind, does) for kind in ("llama", "opt", "bloom") for does in DOES] + [("llama", generate)],
)
def test_everything_is_as_with_named_outputs(model_type, does):
    results = []
    for named in (True, False):
        models = [tiny_model(model_type, seed) for seed in (0, 1)]
        for model in models:
            model.config.return_dict = named
        results.append(does(*models))
        assert all(model.config.return_dict == named for model in models)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_what_only_runs(tmp_path):
    model = tiny_model("llama")
    model.config.return_dict = False
    assert latency(model, prompt_tokens=4, new_tokens=2, repeats=1)["decode_tokens_per_s"] > 0
    assert cache_teacher(model, TOKENS, tmp_path, k=4).vocabulary == 99
