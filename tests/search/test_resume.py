import json

import pytest
from tiny_models import tiny_model, tiny_tokens

import e3kernels
import e3pruner
from e3pruner.search import METHODS

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]


def search(checkpoint=None, **arguments):
    arguments = {"drop": 3, "seed": 5, "progress": False} | arguments
    return e3pruner.search(tiny_model("llama"), BATCHES, checkpoint=checkpoint, **arguments)


def interrupt_after(monkeypatch, count):
    real, calls = e3kernels.entropy_kl, []

    def interrupting(*args, **kwargs):
        if len(calls) == count:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(e3kernels, "entropy_kl", interrupting)
    return calls


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("angular", "bi", "first-n", "random", "last-n")]
)
@pytest.mark.parametrize("count", [0, 7, 12])
def test_an_interrupted_search_ends_with_the_same_plan(method, count, monkeypatch, tmp_path):
    expected = search(method=method)
    path = tmp_path / "search.json"
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            search(path, method=method)
    assert list(tmp_path.iterdir()) == [path]
    kept = len(json.loads(path.read_text())["measured"])
    assert search(path, method=method) == expected
    assert kept <= count + len(BATCHES)  # block influence is measured without a divergence
    assert len(json.loads(path.read_text())["measured"]) > kept


def test_a_finished_search_is_read_back_without_computing(monkeypatch, tmp_path):
    path = tmp_path / "search.json"
    expected = search(path)
    calls = interrupt_after(monkeypatch, 10**6)
    assert search(path) == expected
    assert not calls


def test_measurements_of_another_precision_are_refused(tmp_path):
    path = tmp_path / "search.json"
    search(path, precision="fp32")
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"of another search: it differs in dtype"):
        search(path, precision="bf16")
    assert path.read_bytes() == written


@pytest.mark.parametrize("change", [{"drop": 2}, {"seed": 6}, {"method": "greedy"}, {"protect": [1]}])
def test_another_search_takes_what_is_measured_and_counts_its_cost(change, tmp_path):
    path = tmp_path / "search.json"
    search(path)
    assert search(path, **change) == search(**change)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}', '{"format": "e3pruner.search.checkpoint"}'])
def test_a_damaged_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "search.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"search\.json' is damaged"):
        search(path)
    assert path.read_text() == content


def test_a_checkpoint_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint="):
        search(tmp_path / "absent" / "search.json")
