"""Text begins as the tokenizer's own convention says: each row and each document, once."""

import json

import pytest
import torch
from cli.conftest import END, byte_tokenizer
from tiny_models import tiny_model
from tokenizers.processors import TemplateProcessing

from e3pruner.text import built_in, cut
from e3pruner.text.built_in import demo_tokens
from e3pruner.text.documents import pack_documents, read_documents
from e3pruner.text.kinds import kinds_of_text
from e3pruner.text.opening import encode, opening
from e3pruner.text.sequences import IGNORED
from e3pruner.text.splits import token_splits

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a long answer " * 8}]


def convention(template, special=("<s>", "<sop>"), **settings):
    """A byte tokenizer whose texts are made by `template`, such as "<s> $A"."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": special[0], "additional_special_tokens": list(special[1:])})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (*special, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.chat_template = settings.get("chat_template")
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return convention("<s> $A", chat_template=CHAT)


def starts(tokenizer, rows):
    return set(map(tuple, rows[:, :1].tolist())) == {(tokenizer.bos_token_id,)}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", []),
        ("<s> $A", ["<s>"]),
        ("<s> <sop> $A", ["<s>", "<sop>"]),
        ("<s> $A <|end|>", ["<s>"]),
        ("$A <|end|>", []),
    ],
)
def test_the_opening_is_what_the_tokenizer_puts_before_a_text(template, expected):
    tokenizer = convention(template)
    assert tokenizer.convert_ids_to_tokens(opening(tokenizer)) == expected


def test_a_text_that_holds_its_opening_does_not_get_another(tokenizer):
    assert encode(tokenizer, "<s>ab") == encode(tokenizer, "ab") == tokenizer("ab")["input_ids"]


def test_every_row_of_a_file_begins_with_it_and_nothing_is_lost(tokenizer, text_file):
    plain = token_splits(convention("$A"), text_file, length=63, seed=0)
    rows = token_splits(tokenizer, text_file, length=64, seed=0)
    for ours, theirs in zip(rows, plain, strict=True):
        assert starts(tokenizer, ours)
        assert torch.equal(ours[:, 1:], theirs)
    assert torch.equal(cut(tokenizer, text_file.read_text(encoding="utf-8"), 64)[0], rows.training[0])
    with pytest.raises(ValueError, match="length=1 leaves no room for text behind the 1 token"):
        cut(tokenizer, "some text", 1)


def test_documents_and_the_rows_they_are_cut_into_begin_with_it(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["first", "the second one, which is longer than a row", "third"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    packed = pack_documents(read_documents(path, tokenizer), 16, opening(tokenizer))
    bos = tokenizer.bos_token_id
    assert starts(tokenizer, packed.input_ids)
    assert ((packed.input_ids == bos) == (packed.position_ids == 0)).all()
    begins = packed.input_ids[:, 1:] == bos
    assert begins.any()
    assert (packed.labels[begins] == IGNORED).all()
    assert (packed.labels[~begins] != IGNORED).all()
    whole = tokenizer.decode(packed.input_ids[packed.input_ids != bos])
    assert "".join(text + END for text in texts).startswith(whole)


def test_a_chat_has_the_one_of_its_template(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": TALK}) + "\n") * 3)
    documents = read_documents(path, tokenizer)
    bos = tokenizer.bos_token_id
    assert all(document.tokens.count(bos) == 1 and document.tokens[0] == bos for document in documents)
    packed = pack_documents(documents, 32, opening(tokenizer))
    assert starts(tokenizer, packed.input_ids)
    assert ((packed.input_ids == bos) == (packed.position_ids == 0)).all()
    bare = convention("<s> $A", chat_template=CHAT.replace("{{ bos_token }}", ""))
    documents = read_documents(path, bare)
    assert (
        bos not in pack_documents(documents, 32, opening(bare)).input_ids
    )  # the template alone says how a chat begins


def test_the_built_in_text_begins_with_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("E3_CACHE", str(tmp_path))
    monkeypatch.setattr(built_in, "DOCUMENT_LENGTH", 120)
    prompts = []
    write = built_in.write_documents
    monkeypatch.setattr(
        built_in,
        "write_documents",
        lambda model, encoded, **rest: prompts.extend(encoded) or write(model, encoded, **rest),
    )
    teacher = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    demo = demo_tokens(tokenizer, teacher, length=64, subjects=10)
    bos = tokenizer.bos_token_id
    assert len(prompts) == 20
    assert all(prompt.count(bos) == 1 and prompt[0] == bos for prompt in prompts)
    for rows in (demo.calibration, demo.training, *demo.held_out.values()):
        assert starts(tokenizer, rows)
    text = kinds_of_text(tokenizer, ["manual", "code"], length=64, held_out=4)
    for rows in (text.calibration, text.training, *text.held_out.values()):
        assert starts(tokenizer, rows)
        assert (rows == bos).sum() == len(rows)
