import json

import pytest
import torch
from cli.conftest import END, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_model

from e3pruner import cache_teacher, distill, prune
from e3pruner.recovery.loss import DistillLoss
from e3pruner.recovery.options import DistillOptions
from e3pruner.recovery.teacher import LiveTeacher
from e3pruner.text import Packed
from e3pruner.text.batches import Batch
from e3pruner.text.documents import Marked, pack_documents, read_documents
from e3pruner.text.sequences import IGNORED

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "me"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(tokenizer, document):
    """The document, and what of it is learnt."""
    chosen = [token for token, mark in zip(document.tokens, document.learnt, strict=True) if mark]
    return tokenizer.decode(document.tokens), tokenizer.decode(chosen)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n", encoding="utf-8")
    return path


def test_the_assistant_s_part_alone_is_learnt(tokenizer, tmp_path):
    (document,) = read_documents(write_lines(tmp_path / "a.jsonl", {"messages": TALK}), tokenizer)
    whole = "<user>hi<|end|>\n<assistant>yes?<|end|>\n<user>who<|end|>\n<assistant>me<|end|>\n"
    assert texts(tokenizer, document) == (whole, "yes?<|end|>\nme<|end|>\n")


def test_text_is_learnt_whole_and_ends(tokenizer, tmp_path):
    (document,) = read_documents(write_lines(tmp_path / "a.jsonl", {"text": "naïve"}), tokenizer)
    assert texts(tokenizer, document) == ("naïve" + END, "naïve" + END)


def test_a_data_set_on_disk_is_read_as_json_lines_are(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs e3kernels[trl]")
    records = [{"messages": TALK}, {"messages": TALK[:2]}]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "set")
    expected = read_documents(write_lines(tmp_path / "a.jsonl", *records), tokenizer)
    assert read_documents(tmp_path / "set", tokenizer) == expected
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]"):
        read_documents(tmp_path / "splits", tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"txt": "a"}, r'record 2: it must hold "text"'),
        (["text"], r'record 2: it must hold "text"'),
        ({"messages": []}, "must hold role and content"),
        ({"messages": [{"role": "user"}]}, "must hold role and content"),
        ({"messages": TALK[1:]}, "the assistant begins"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(tokenizer, tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        read_documents(write_lines(tmp_path / "a.jsonl", {"text": "a"}, record), tokenizer)


def test_lines_and_templates_that_cannot_be_read_are_named(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 is no JSON"):
        read_documents(tmp_path / "a.jsonl", tokenizer)
    chat = write_lines(tmp_path / "b.jsonl", {"messages": TALK})
    with pytest.raises(ValueError, match="has no chat template"):
        read_documents(chat, byte_tokenizer())
    counting = byte_tokenizer()
    counting.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="rewrites earlier messages"):
        read_documents(chat, counting)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(2, 7))
def test_packing_keeps_every_token_apart_and_in_order(documents, length):
    marked, token = [], 0
    for marks in documents:
        marked.append(Marked(list(range(token, token + len(marks))), marks))
        token += len(marks)
    starts = {document.tokens[0] for document in marked}
    learnt = {t for document in marked for t, mark in zip(*document, strict=True) if mark}
    whole = [list(range(i, i + length)) for i in range(0, token - length + 1, length)]
    expected = [[t if t in learnt and t not in starts else IGNORED for t in row[1:]] for row in whole]
    kept = [i for i, labels in enumerate(expected) if set(labels) != {IGNORED}]
    if not kept:
        with pytest.raises(ValueError, match="make no row with any to predict"):
            pack_documents(marked, length)
        return
    packed = pack_documents(marked, length)
    assert packed.input_ids.tolist() == [whole[i] for i in kept]
    assert packed.labels.tolist() == [expected[i] for i in kept]
    for ids, positions in zip(packed.input_ids.tolist(), packed.position_ids.tolist(), strict=True):
        for column, position in enumerate(positions):
            begins = column == 0 or ids[column] in starts
            assert position == (0 if begins else positions[column - 1] + 1)


def documents_of(*sizes):
    ids = torch.randint(3, VOCAB_SIZE, (sum(sizes),), generator=torch.Generator().manual_seed(0))
    return [Marked(part.tolist(), [True] * len(part)) for part in ids.split(list(sizes))]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3"])
def test_packed_documents_are_predicted_as_if_alone(model_type):
    teacher = tiny_model(model_type)
    student = prune(teacher, [0, 1, 3, 5])
    documents = documents_of(7, 9)
    loss = DistillLoss(student, LiveTeacher(teacher), DistillOptions(), None)

    def stats(batch):
        with torch.no_grad():
            return loss(batch, loss.targets(batch), "sum")[1]

    packed = stats(Batch.of_rows(pack_documents(documents, 16), torch.tensor([0])))
    alone = [stats(Batch.of_rows(torch.tensor([d.tokens]), torch.tensor([0]))) for d in documents]
    for name in ("kl", "cross_entropy", "teacher_entropy"):
        values = getattr(packed, name)[0]
        assert values[6] == 0
        expected = torch.cat([getattr(one, name)[0] for one in alone])
        torch.testing.assert_close(torch.cat([values[:6], values[7:]]), expected, rtol=1e-4, atol=1e-4)


def test_the_cache_knows_documents(tmp_path):
    teacher = tiny_model("llama")
    packed = pack_documents(documents_of(5, 20, 3, 11, 30, 19), 16)
    cache = cache_teacher(teacher, packed, tmp_path / "cache", k=VOCAB_SIZE, precision="fp32")
    options = {"data": packed, "steps": 3, "precision": "fp32", "held_out": packed}
    live = distill(prune(teacher, [0, 2, 5]), teacher=teacher, **options)
    stored = distill(prune(teacher, [0, 2, 5]), teacher=cache, **options)
    assert [p["loss"] for p in stored.curve] == pytest.approx([p["loss"] for p in live.curve], rel=1e-3)
    assert stored.held_out[-1]["perplexity"] == pytest.approx(live.held_out[-1]["perplexity"], rel=1e-3)
    with pytest.raises(ValueError, match="is not what"):
        distill(prune(teacher, [0, 2, 5]), teacher=cache, **options | {"data": packed.input_ids})


def test_a_model_that_cannot_keep_documents_apart_is_refused(tmp_path):
    teacher = tiny_model("bloom")
    packed = pack_documents(documents_of(7, 25), 16)
    with pytest.raises(ValueError, match=r"teacher \(bloom\)"):
        distill(prune(teacher, [0, 2, 5]), teacher=teacher, data=packed)
    with pytest.raises(ValueError, match=r"teacher \(bloom\)"):
        cache_teacher(teacher, packed, tmp_path / "cache")


def test_packed_shapes_are_checked():
    ids, labels = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\); input_ids ask for \(2, 3\)"):
        Packed(ids, ids, ids)
    labels[1] = IGNORED
    with pytest.raises(ValueError, match="row 1 has nothing to predict"):
        Packed(ids, ids, labels)
