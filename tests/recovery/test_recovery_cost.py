"""The bench of what recovery costs, on a tiny model and tiny heads: every figure is there and possible."""

import json

from cli.conftest import byte_tokenizer
from recovery import cost
from tiny_models import tiny_model


def test_every_figure_is_measured(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(cost.heads, "SIZES", [(32, 4096, 512)])
    out = tmp_path / "cost.json"
    arguments = ["--model", str(tmp_path / "model"), "--drop", "2", "--sequences", "16", "--length", "32"]
    cost.main([*arguments, "--steps", "2", "--rounds", "1", "--out", str(out)])

    results = json.loads(out.read_text())
    cache, training = results["cache"], results["training"]
    assert cache["tokens"] == 16 * 32
    # 10 ids and log-probabilities of two bytes for all but the first of 32 tokens, and the files' headers.
    assert 40 * 31 / 32 < cache["bytes_per_token"] < 44
    assert all(value > 0 for value in cache.values())
    assert [len(training[name]["step_seconds"]) for name in ("live", "cache")] == [2, 2]
    assert training["cache_over_live"] == training["cache"]["tokens_per_s"] / training["live"]["tokens_per_s"]
    assert training["teacher_bytes"] > 0
    rows = {(row["loss"], row["provider"], row["head"]): row for row in results["losses"]}
    assert len(rows) == len(results["losses"]) == 17
    hidden, weight, logits = (2 * size for size in (512 * 32, 4096 * 32, 512 * 4096))
    for (loss, _, head), row in rows.items():
        expected = {"frozen": hidden, "trained": hidden + weight, None: logits}[head]
        assert row["gradient_bytes"] == expected, loss
    # What is whole holds several copies of the logits; e3 none of its own.
    assert rows["topk_kl", "eager", None]["peak_bytes"] > 2 * logits
    assert rows["topk_kl", "e3", None]["peak_bytes"] < logits
    assert not list(tmp_path.glob("tmp*"))
    assert "--drop 2" in results["command"]
