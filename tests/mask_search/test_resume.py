import json

import pytest
import torch
from mask_search.conftest import QUICK
from tiny_models import tiny_model, tiny_tokens

import e3pruner
from e3pruner.mask_search import METHODS
from e3pruner.mask_search.measurements import Measurements
from e3pruner.storage import write_checked

BATCHES = [tiny_tokens(seed=seed) for seed in range(2)]


def search(checkpoint=None, **arguments):
    arguments = {"drop": 3, "seed": 5, "progress": False} | QUICK.get(arguments.get("method"), {}) | arguments
    return e3pruner.search(tiny_model("llama"), BATCHES, checkpoint=checkpoint, **arguments)


def interrupt_at(monkeypatch, count):
    """The measurement with this number, from 0, is made and lost. Returns the list of those that are kept."""
    keep, kept = Measurements.add, []

    def interrupting(known, found, seconds):
        if len(kept) == count:
            raise KeyboardInterrupt
        kept.append(found)
        keep(known, found, seconds)

    monkeypatch.setattr(Measurements, "add", interrupting)
    return kept


LONG = ("gumbel-topk", "evolution", "policy-gradient", "straight-through", "clp")
POINTS = [*((method, count) for method in METHODS for count in (0, 1)), ("greedy", 5), *((m, 6) for m in LONG)]


@pytest.mark.parametrize(("method", "count"), POINTS)
def test_an_interrupted_search_ends_with_the_same_plan(method, count, monkeypatch, tmp_path):
    expected = search(method=method)
    path = tmp_path / "search.json"
    with monkeypatch.context() as patch:
        kept = interrupt_at(patch, count)
        with pytest.raises(KeyboardInterrupt):
            search(path, method=method)
    assert list(tmp_path.iterdir()) == [path]
    measured = json.loads(path.read_text())["measured"]
    assert measured.keys() == set().union(*kept)
    assert search(path, method=method) == expected
    assert len(json.loads(path.read_text())["measured"]) > len(measured)


def test_a_finished_search_is_read_back_without_computing(monkeypatch, tmp_path):
    path = tmp_path / "search.json"
    expected = search(path)
    kept = interrupt_at(monkeypatch, 0)
    assert search(path) == expected
    assert not kept


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


DEEP = "[" * 100_000
FORMAT = '{"format": "e3pruner.search.checkpoint 2"}'


@pytest.mark.parametrize("content", ["", "{", "[]", "null", DEEP, '{"format": "other"}', FORMAT])
def test_a_damaged_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "search.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"search\.json' is damaged"):
        search(path)
    assert path.read_text() == content


def test_another_figure_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "search.json"
    search(path)
    measured = json.loads(path.read_text())["measured"]
    figure = next(iter(measured.values()))[0]
    path.write_text(path.read_text().replace(repr(figure), repr(2 * figure)))
    with pytest.raises(ValueError, match=r"search\.json' is damaged .*its content is not that of its checksum"):
        search(path)


@pytest.mark.parametrize("part", ["identity", "measured", "seconds"])
def test_parts_of_another_form_are_named(part, tmp_path):
    path = tmp_path / "search.json"
    search(path)
    content = json.loads(path.read_text())
    for value in (None, [], 3, {"x": None} if part != "identity" else "x"):
        write_checked(path, content["format"], {k: v for k, v in content.items() if k != "checksum"} | {part: value})
        with pytest.raises(ValueError, match=rf"search\.json' is damaged .*{part}"):
            search(path)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.4.self_attn.q_proj.bias"])
def test_a_checkpoint_of_a_model_with_one_other_weight_is_refused(name, tmp_path):
    path = tmp_path / "search.json"
    search(path)
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_parameter(name).flatten()[-1] += 0.5
    with pytest.raises(ValueError, match=r"of another search: it differs in model"):
        e3pruner.search(other, BATCHES, drop=3, seed=5, progress=False, checkpoint=path)


def test_a_checkpoint_of_a_model_with_another_buffer_is_refused(tmp_path):
    model, path = tiny_model("deepseek_v3"), tmp_path / "search.json"
    arguments = {"drop": 2, "method": "bi", "progress": False, "checkpoint": path}
    e3pruner.search(model, BATCHES, **arguments)
    (buffer, *_) = (b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    buffer[0] += 1
    with pytest.raises(ValueError, match=r"of another search: it differs in model"):
        e3pruner.search(model, BATCHES, **arguments)


def test_a_checkpoint_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint="):
        search(tmp_path / "absent" / "search.json")


@pytest.mark.parametrize("method", ["gumbel-topk", "greedy"])
def test_masks_in_groups_end_with_the_same_plan(method):
    expected = search(method=method)
    for count in (1, 3):
        assert search(method=method, masks_at_once=count) == expected


def test_joined_calls_go_on_to_the_same_plan(monkeypatch, tmp_path):
    expected, path = search(prefixes_per_call=4), tmp_path / "search.json"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            search(path, prefixes_per_call=4)
    with pytest.raises(ValueError, match=r"of another search: it differs in prefixes_per_call"):
        search(path)
    assert search(path, prefixes_per_call=4) == expected
    assert expected.metrics["kl"] == pytest.approx(search().metrics["kl"], rel=1e-4)


@pytest.mark.parametrize("name", ["masks_at_once", "prefixes_per_call"])
def test_numbers_of_masks_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=0 must be an integer from 1"):
        search(**{name: 0})
