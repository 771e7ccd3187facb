"""Checkpoints that can be published: card, plan, no path of this machine, and the way to and from the Hub."""

import pytest
from huggingface_hub import HfApi, ModelCard

from e3pruner.card import source_facts, without_paths, write_card
from e3pruner.models.loading import model_folder
from e3pruner.pipelines.publishing import NOT_PUBLISHED, check_access, push
from e3pruner.surgery import PruningPlan

PLAN = PruningPlan.of_removed([1, 3], 6, method="greedy", seed=4)
SOURCE = "---\nlicense: llama3.1\ntags: [chat]\nlanguage: en\n---\n# A model\n"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A model in the Hub's cache, with a card of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "models--org--dense" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(SOURCE)
    return folder


def test_the_card_says_where_the_model_comes_from_and_what_was_done(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    figures = [{"name": f"{tmp_path}/pruned", "kl": 1.25, "perplexity": 42.0, "parameters": 1_000_000}]
    PLAN.save(out / "pruning.json")
    write_card(out, str(source), PLAN, f"e3 prune --model {source} --out={out}", figures=figures)
    card = ModelCard.load(out / "README.md")
    said = card.data.to_dict()
    assert said["base_model"] == "org/dense"
    assert (said["license"], said["language"], said["library_name"]) == ("llama3.1", "en", "transformers")
    assert said["tags"] == ["chat", "layer-pruning", "e3kernels"]
    assert "4 of 6 decoder layers are left. Removed, counted from 0: [1, 3]." in card.text
    assert "| pruned | 1.25 | 42 | 1,000,000 |" in card.text
    assert "e3 prune --model abc --out=out" in card.text
    assert "## Limits" in card.text
    for path in out.iterdir():
        assert str(tmp_path) not in path.read_text()
    # A recovered model of the pruned one still names the dense one.
    again = tmp_path / "again"
    again.mkdir()
    (out / "config.json").write_text("{}")
    write_card(again, str(out), PLAN, "e3 distill", recovered="Distilled.")
    said = ModelCard.load(again / "README.md").data.to_dict()
    assert said["base_model"] == "org/dense"
    assert said["tags"] == ["chat", "layer-pruning", "e3kernels", "distillation"]


def test_the_built_in_model_has_its_licence():
    assert source_facts("smollm2")["license"] == "apache-2.0"


def test_a_card_that_cannot_be_read_is_named_and_stops_nothing(source):
    (source / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n")
    with pytest.warns(UserWarning, match=r"README\.md cannot be read, so licence and tags are not taken over"):
        assert source_facts(str(source)) == {"base_model": "org/dense"}


def test_hub_ids_stay_and_paths_go():
    assert without_paths("e3 x --model org/m@v1 --text /a/b.txt --out=../run/out") == (
        "e3 x --model org/m@v1 --text b.txt --out=out"
    )


def test_offline_a_hub_id_names_the_command_that_downloads_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="`hf download nobody/nothing` where the Hub can be reached"):
        model_folder("nobody/nothing@main")
    with pytest.raises(FileNotFoundError, match=r"neither a folder with a config\.json, nor 'smollm2', nor a Hub id"):
        model_folder("nothing")


def test_a_model_in_the_hubs_cache_is_found_by_its_id(source, tmp_path, monkeypatch):
    refs = tmp_path / "models--org--dense" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.chdir(source)
    monkeypatch.setattr("e3pruner.models.loading.snapshot_download", _from(tmp_path))
    assert model_folder("org/dense") == source
    assert source_facts("org/dense")["base_model"] == "org/dense"


def _from(cache):
    from huggingface_hub import snapshot_download

    return lambda *args, **options: snapshot_download(*args, cache_dir=cache, local_files_only=True, **options)


def test_without_the_hub_a_push_is_refused_before_the_work():
    with pytest.raises(ValueError, match=r"--push-to-hub me/it: the Hub cannot be written to .*`hf upload me/it OUT`"):
        check_access("me/it")
    with pytest.raises(ValueError, match="--push-to-hub it must be a Hub id, OWNER/NAME"):
        check_access("it")


def test_what_is_pushed_is_the_checkpoint_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **options: calls.append(args))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options))
    push(tmp_path, "me/it")
    assert calls[0] == ("me/it",)
    assert calls[1] == {"repo_id": "me/it", "folder_path": tmp_path, "ignore_patterns": NOT_PUBLISHED}
