import os
import shutil
import signal

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from e3pruner import prune
from e3pruner.models import OutputHead, last_hidden, output_head
from e3pruner.models.loading import load_model
from e3pruner.models.streaming import stream_of
from e3pruner.recovery import TeacherCache, cache_teacher, distill
from e3pruner.recovery import cache as cache_module
from e3pruner.recovery.cache import KIND, cache_bytes
from e3pruner.storage import read_checked, write_checked
from e3pruner.text.batches import in_order

LENGTH = 16


def sequences(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def tokenizer(words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words.split())}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_TOKENS", 8 * LENGTH)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama")


def make(teacher, folder, **options):
    return cache_teacher(teacher, sequences(20), folder, **{"batch_size": 4, "precision": "fp32"} | options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_stored_is_what_the_teacher_predicts(teacher, tmp_path):
    cache = make(teacher, tmp_path / "cache", k=5)
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 3
    log_p = teacher(sequences(20)).logits[:, :-1].log_softmax(-1)
    for batch in in_order(sequences(20)[torch.arange(20)], 7):
        logprobs, ids = cache.targets(batch)
        expected = log_p[batch.rows].topk(5)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(logprobs, expected.values, rtol=1e-3, atol=1e-4)
    cache.verify()


def test_an_improbable_id_is_stored_too(tmp_path):
    """A log-probability below fp16's range is no padding: k ids stay k ids."""
    teacher = tiny_model("llama")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1e7)
    cache = make(teacher, tmp_path / "cache", k=5)
    logprobs, _ = cache.targets(next(iter(in_order(sequences(20)[torch.arange(20)], 20))))
    assert logprobs.isfinite().all()
    assert logprobs.min() == torch.finfo(torch.float16).min


def test_bf16_is_that_of_autocast(teacher, tmp_path):
    cache = make(teacher, tmp_path / "cache", precision="bf16", k=VOCAB_SIZE)
    batch = next(in_order(sequences(20), 20))
    logprobs, ids = cache.targets(batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = teacher(batch.input_ids).logits[:, :-1]
    expected = expected.float().log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("vocabulary", "per_token"), [(49_152, 40), (151_936, 60)])
def test_bytes_per_token(vocabulary, per_token):
    head = OutputHead(torch.empty(vocabulary, 576, dtype=torch.bfloat16, device="meta"), None, None, 1.0)
    assert cache_bytes(1000, 257, head) == 1000 * 256 * per_token
    assert cache_bytes(1000, 257, head, "hidden") == 1000 * 256 * 1152 + vocabulary * 1152
    assert cache_bytes(1000, 257, head, "hidden-int8") == 1000 * 256 * 580 + vocabulary * 1152


def test_the_disk_holds_what_was_estimated(teacher, tmp_path):
    make(teacher, tmp_path / "cache")
    stored = sum(file.stat().st_size for file in (tmp_path / "cache").glob("shard-*"))
    estimate = cache_bytes(20, LENGTH, output_head(teacher))
    assert estimate <= stored <= estimate + 3 * 400


def test_a_large_vocabulary_takes_at_most_62_bytes_a_token(tmp_path):
    teacher = tiny_model("llama", vocab_size=70_000, max_position_embeddings=256)
    data = torch.randint(3, 70_000, (4, 256), generator=torch.Generator().manual_seed(0))
    cache = cache_teacher(teacher, data, tmp_path / "cache")
    stored = sum(file.stat().st_size for file in cache.folder.iterdir())
    assert 59 * data.numel() < stored <= 62 * data.numel()


def left(logprobs):
    """Log of the probability that is not in `logprobs`; rounding may leave less than none."""
    return (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-20).log()


@pytest.mark.parametrize("tail", ["bucket", "renorm", "truncated"])
def test_the_tail_is_treated_as_asked(teacher, tmp_path, tail):
    make(teacher, tmp_path / "cache", k=5)
    cache = TeacherCache(tmp_path / "cache", tail=tail)
    student = prune(teacher, [0, 2, 5])
    batch = next(in_order(sequences(20), 20))
    logprobs, ids = cache.targets(batch)
    log_q = student(batch.input_ids).logits[:, :-1].log_softmax(-1).gather(-1, ids).detach()
    if tail == "renorm":
        logprobs, log_q = logprobs.log_softmax(-1), log_q.log_softmax(-1)
    elif tail == "bucket":
        logprobs, log_q = (torch.cat([x, left(x)], -1) for x in (logprobs, log_q))
    expected = (logprobs.exp() * (logprobs - log_q)).sum(-1).mean()
    options = {"batch_size": 20, "precision": "fp32", "kd_ratio": 1.0, "weighting": "none"}
    result = distill(student, teacher=cache, data=sequences(20), **options)
    assert result.curve[0]["loss"] == pytest.approx(float(expected), rel=1e-3)


def test_another_tail_is_another_teacher(teacher, tmp_path):
    make(teacher, tmp_path / "cache")
    assert len({TeacherCache(tmp_path / "cache", tail=tail).identity for tail in ("bucket", "renorm")}) == 2
    with pytest.raises(ValueError, match="tail='tail' must be one of"):
        TeacherCache(tmp_path / "cache", tail="tail")


def test_a_cache_of_the_whole_vocabulary_teaches_as_the_live_teacher(teacher, tmp_path):
    cache = make(teacher, tmp_path / "cache", k=VOCAB_SIZE)
    options = {"data": sequences(20), "steps": 3, "precision": "fp32"}
    live = distill(prune(teacher, [0, 2, 5]), teacher=teacher, **options)
    stored = distill(prune(teacher, [0, 2, 5]), teacher=cache, **options)
    assert [p["loss"] for p in stored.curve] == pytest.approx([p["loss"] for p in live.curve], rel=1e-3)


@pytest.mark.parametrize(("store", "error"), [("hidden", 2**-8), ("hidden-int8", 2**-6)])
@pytest.mark.parametrize(
    "options", [{}, {"divergence": "reverse", "temperature": 2.0}], ids=["forward", "reverse, T 2"]
)
def test_hidden_states_teach_as_the_live_teacher_over_the_whole_vocabulary(teacher, tmp_path, store, error, options):
    cache = make(teacher, tmp_path / "cache", store=store)
    options |= {"data": sequences(20), "steps": 3, "precision": "fp32"}
    live = distill(prune(teacher, [0, 2, 5]), teacher=teacher, **options)
    stored = distill(prune(teacher, [0, 2, 5]), teacher=cache, **options)
    assert [p["loss"] for p in stored.curve] == pytest.approx([p["loss"] for p in live.curve], rel=error)


@pytest.mark.parametrize(("store", "bits"), [("hidden", 8), ("hidden-int8", 7)])
def test_hidden_states_are_rounded_and_no_more(teacher, tmp_path, store, bits):
    cache = make(teacher, tmp_path / "cache", store=store)
    batch = next(in_order(sequences(20), 20))
    expected = last_hidden(teacher, batch.input_ids)[:, :-1].detach()
    found = cache.targets(batch)
    assert (found - expected).abs().amax(-1).le(2.0**-bits * expected.abs().amax(-1)).all()
    if store == "hidden":
        assert torch.equal(found, expected.bfloat16().float())


def test_hidden_states_take_no_k_and_a_damaged_head_is_named(teacher, tmp_path):
    with pytest.raises(ValueError, match="k=5 is of store='topk'; store='hidden' keeps the whole vocabulary"):
        make(teacher, tmp_path / "cache", store="hidden", k=5)
    with pytest.raises(ValueError, match="store='logits' must be one of topk, hidden, hidden-int8"):
        make(teacher, tmp_path / "cache", store="logits")
    make(teacher, tmp_path / "cache", store="hidden")
    file = tmp_path / "cache" / "head.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"head.safetensors is damaged"):
        TeacherCache(tmp_path / "cache")


def test_a_streamed_teacher_is_read_once_for_all_batches_of_a_shard(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    streamed = load_model(str(tmp_path / "teacher"), "cpu", placement="stream")
    make(streamed, tmp_path / "streamed", store="hidden")
    before = list(stream_of(streamed).reads)
    make(streamed, tmp_path / "again", store="hidden")
    assert [now - then for now, then in zip(stream_of(streamed).reads, before, strict=True)] == [3] * 6  # shards
    make(load_model(str(tmp_path / "teacher"), "cpu"), tmp_path / "whole", store="hidden")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_from_the_cache_lowers_loss_and_perplexity(teacher, tmp_path, precision):
    cache = make(teacher, tmp_path / "cache")
    student = prune(teacher, [0, 1, 3, 5])
    options = {"steps": 30, "precision": precision, "lr": 3e-3, "eval_every": 30}
    result = distill(student, teacher=cache, data=sequences(20), held_out=sequences(20), **options)
    assert result.curve[-1]["loss"] < 0.8 * result.curve[0]["loss"]
    assert result.held_out[-1]["perplexity"] < 0.8 * result.held_out[0]["perplexity"]
    assert "kl" not in result.held_out[0]


def test_a_killed_run_is_completed_to_the_same_bytes(teacher, tmp_path):
    make(teacher, tmp_path / "whole")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        calls = []
        teacher.base_model.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 4 else calls.append(1)
        )
        make(teacher, tmp_path / "killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(contents(tmp_path / "killed")) < len(contents(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"is unfinished: 1 shards, shard-00002"):
        TeacherCache(tmp_path / "killed")
    make(teacher, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"k": 3}, "k"), ({"temperature": 2.0}, "temperature"), ({"batch_size": 2}, "batch_size"), ({}, "model")],
)
def test_a_cache_of_other_settings_is_not_mixed(teacher, tmp_path, changes, name):
    make(teacher, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    other = teacher if changes else tiny_model("llama", seed=5)
    with pytest.raises(ValueError, match=f"holds a cache with {name} "):
        make(other, tmp_path / "cache", **changes)
    assert contents(tmp_path / "cache") == before


def test_other_data_temperature_tokenizer_and_vocabulary_are_refused(teacher, tmp_path):
    cache = make(teacher, tmp_path / "cache", tokenizer=tokenizer("a b c"))
    student = prune(teacher, [0, 1])
    with pytest.raises(ValueError, match=r"data \(20, 16\) is not what .*cache"):
        distill(student, teacher=cache, data=sequences(20, seed=1))
    with pytest.raises(ValueError, match=r"temperature=2.0 must be that of .*, 1.0"):
        distill(student, teacher=cache, data=sequences(20), temperature=2.0)
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        TeacherCache(tmp_path / "cache", tokenizer=tokenizer("a c b"))
    assert TeacherCache(tmp_path / "cache", tokenizer=tokenizer("a b c")).identity == cache.identity
    with pytest.raises(ValueError, match=r"vocabulary of 99 tokens and the student one of 120"):
        distill(prune(tiny_model("llama", vocab_size=120), [0]), teacher=cache, data=sequences(20))


def test_damage_is_found(teacher, tmp_path):
    folder = tmp_path / "cache"
    make(teacher, folder)
    file = folder / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        TeacherCache(folder).verify()
    os.truncate(file, 100)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing or damaged"):
        TeacherCache(folder).verify()


def test_a_flipped_bit_is_found_where_it_would_be_learnt(teacher, tmp_path):
    cache = make(teacher, tmp_path / "cache")
    file = tmp_path / "cache" / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    student = prune(teacher, [0, 2, 5])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        distill(student, teacher=TeacherCache(cache.folder), data=sequences(20), steps=5, precision="fp32")


def edit(file, **values):
    """Other values, with the checksum that belongs to them."""
    write_checked(file, KIND, read_checked(file, KIND, {}) | values)


def replace(file, old, new):
    file.write_text(file.read_text().replace(old, new))


MANIFESTS = {
    "missing": lambda file: file.unlink(),
    "cut short": lambda file: file.write_text("{"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "null": lambda file: file.write_text("null"),
    "nothing in it": lambda file: write_checked(file, KIND, {}),
    "another temperature": lambda file: replace(file, '"temperature": 1.0', '"temperature": 1.5'),
    "another format": lambda file: edit(file, format=1),
    "no temperature": lambda file: edit(file, temperature=None),
    "no data": lambda file: edit(file, data={}),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_named(teacher, tmp_path, damage):
    make(teacher, tmp_path / "cache")
    MANIFESTS[damage](tmp_path / "cache" / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json is (missing|damaged|not of the format)"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["sequences", "length", "vocabulary", "k", "shard_rows"])
def test_sizes_that_are_none_are_named(teacher, tmp_path, name):
    make(teacher, tmp_path / "cache")
    for value in (0, -1, None, [], "20", True, 2.5):
        edit(tmp_path / "cache" / "manifest.json", **{name: value})
        with pytest.raises(ValueError, match=rf"manifest\.json is damaged: {name} is .*, not positive"):
            TeacherCache(tmp_path / "cache")


def test_a_teacher_that_knows_nothing_is_refused(tmp_path):
    teacher = tiny_model("llama")
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"logits"):
        make(teacher, tmp_path / "cache")


def test_nothing_starts_without_room_or_beside_other_files(teacher, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not empty and holds no cache"):
        make(teacher, tmp_path)
    usage = shutil._ntuple_diskusage(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"has room for 1,000 bytes, the cache needs 12,000"):
        make(teacher, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("k", [0, VOCAB_SIZE + 1])
def test_k_is_checked(teacher, tmp_path, k):
    with pytest.raises(ValueError, match=f"k={k} must be in 1 … {VOCAB_SIZE}"):
        make(teacher, tmp_path / "cache", k=k)
