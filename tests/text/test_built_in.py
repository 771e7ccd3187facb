import copy
from itertools import combinations
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from e3pruner.text import built_in as text
from e3pruner.text import writer
from e3pruner.text.built_in import DemoText, deal, demo_tokens, manual_documents, pack

CHAT = "{% for m in messages %}<user>{{ m.content }}<end>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<end>", "<user>", "<assistant>"]
    raw.train_from_iterator(topics.values(), trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", chat_template=CHAT)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llama", vocab_size=500, max_position_embeddings=256)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("E3_CACHE", str(tmp_path))
    return tmp_path


def paragraphs(names):
    documents = manual_documents()
    return {" ".join(p.split()) for name in names for p in documents[name].split("\n\n") if len(p) > 100}


def test_no_paragraph_of_the_manual_is_in_two_splits():
    documents = manual_documents()
    dealt = deal({name: len(document) for name, document in documents.items()})
    assert sorted(name for names in dealt.values() for name in names) == sorted(documents)
    for a, b in combinations(dealt.values(), 2):
        assert not paragraphs(a) & paragraphs(b)
    # Many topics quote each other, so a split by topic would have failed the above.
    assert len(documents) < len(topics)
    everything = {" ".join(p.split()) for t in topics.values() for p in t.split("\n\n") if len(p) > 100}
    assert paragraphs(documents) == everything


@given(st.lists(st.integers(1, 1000), min_size=40, max_size=60))
def test_dealing_gives_every_split_documents_and_none_twice(lengths):
    sizes = {f"document {i}": length for i, length in enumerate(lengths)}
    dealt = deal(sizes)
    names = [name for split in dealt.values() for name in split]
    assert sorted(names) == sorted(sizes)
    assert all(dealt.values())
    assert dealt == deal(dict(reversed(sizes.items())))


def test_the_manual_alone_needs_no_teacher(tokenizer):
    demo = demo_tokens(tokenizer, length=64)
    assert list(demo.held_out) == ["manual"]
    rows = {"training": demo.training, "calibration": demo.calibration, "held_out": demo.held_out["manual"]}
    total = sum(len(r) for r in rows.values())
    for split, part in rows.items():
        assert part.shape[1] == 64
        assert len(part) / total == pytest.approx(text.SHARES[split], abs=0.05)


def test_what_the_teacher_writes_is_split_by_subject_and_kept(tokenizer, teacher, cache, monkeypatch):
    monkeypatch.setattr(text, "DOCUMENT_LENGTH", 48)
    demo = demo_tokens(tokenizer, teacher, length=32, subjects=10)
    assert list(demo.held_out) == ["manual", "prose", "chat"]
    subjects = {
        s: {name.partition("/")[2] for name in names if "manual" not in name} for s, names in demo.sources.items()
    }
    assert sum(map(len, subjects.values())) == 10
    assert all(subjects.values())
    assert not subjects["held_out"] & (subjects["training"] | subjects["calibration"])
    assert [f.suffix for f in cache.iterdir()] == [".safetensors"]

    monkeypatch.setattr(text, "write_documents", None)  # what was kept is not written again
    again = demo_tokens(tokenizer, teacher, length=32, subjects=10)
    assert torch.equal(again.training, demo.training)
    assert again.sources == demo.sources


def test_shared_documents_are_refused():
    rows = torch.zeros(1, 4, dtype=torch.int64)
    sources = {"training": frozenset("ab"), "calibration": frozenset("c"), "held_out": frozenset("bd")}
    with pytest.raises(ValueError, match=r"training and held_out share the documents \['b'\]"):
        DemoText(rows, rows, {"manual": rows}, sources)


@pytest.mark.parametrize("subjects", [9, 65])
def test_the_number_of_subjects_is_checked(tokenizer, teacher, subjects):
    with pytest.raises(ValueError, match=f"subjects={subjects} must be in 10 … 64"):
        demo_tokens(tokenizer, teacher, subjects=subjects)


def test_packing_loses_only_the_last_piece():
    documents = [text.Document(str(i), "manual", [i] * i) for i in range(1, 6)]
    packed = pack(documents, 4)
    assert packed.flatten().tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5]
    assert sorted(pack(documents, 15, seed=1).flatten().tolist()) == sorted(i for i in range(1, 6) for _ in range(i))
    with pytest.raises(ValueError, match=r"length=16 is more than the 15 tokens of the 5 documents"):
        pack(documents, 16)


def test_writing_is_reproducible_and_leaves_the_teacher_alone(teacher):
    prompts = [[5, 6, 7], [8], [9, 10]]
    before = copy.deepcopy(teacher.state_dict())
    first = writer.write_documents(teacher, prompts, length=20, end=2, seed=3)
    assert first == writer.write_documents(teacher, prompts, length=20, end=2, seed=3)
    assert first != writer.write_documents(teacher, prompts, length=20, end=2, seed=4)
    assert [row[: len(p)] for row, p in zip(first, prompts, strict=True)] == prompts
    assert all(len(row) == 20 or row[-1] == 2 for row in first)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"length=3 must exceed the longest prompt, 3 tokens"):
        writer.write_documents(teacher, prompts, length=3, end=2, seed=0)


def test_prompts_of_different_lengths_are_continued_as_if_alone(teacher, monkeypatch):
    monkeypatch.setattr(writer, "TOP_K", 1)
    prompts = [[5, 6, 7, 11, 12, 13], [8], [9, 10]]
    together = writer.write_documents(teacher, prompts, length=12, end=2, seed=0)
    alone = [writer.write_documents(teacher, [p], length=12, end=2, seed=0)[0] for p in prompts]
    assert together == alone
    model = copy.deepcopy(teacher).to(torch.bfloat16)
    for prompt, row in zip(prompts, alone, strict=True):
        logits = model(torch.tensor([row])).logits[0]
        assert row[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
