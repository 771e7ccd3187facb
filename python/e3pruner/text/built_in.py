"""Calibration, training and held-out text that needs no network: the Python manual, and what the teacher writes itself.

Documents, not tokens, are dealt out to the splits, so that no held-out document was ever calibrated or trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from e3pruner.models.identity import model_identity
from e3pruner.storage import cache_home, fingerprint, write_tensors
from e3pruner.text.documents import ending
from e3pruner.text.opening import cut_stream, encode, opening, without_opening
from e3pruner.text.writer import write_documents

SHARES = {"training": 0.7, "calibration": 0.1, "held_out": 0.2}
SUBJECTS = tuple(
    """bread glaciers violins bees lighthouses vaccines chess volcanoes paper bridges tides coffee whales gardens maps
    fractions earthquakes kites clocks rice submarines owls democracy mirrors wool comets libraries salt bicycles
    deserts insurance photosynthesis pottery radio rainbows inflation dreams castles antibiotics dolphins compasses
    elections glass magnets marathons mushrooms museums novels opera penguins printing railways rivers satellites sleep
    soap spices telescopes theatre tomatoes trade windmills yoga zebras""".split()  # noqa: SIM905
)
DOCUMENT_LENGTH = 160
OPENERS = (
    "The history of {} begins",
    "Most people who first learn about {} are surprised that",
    "A short story about {}.",
)
QUESTIONS = ("Explain {} to a student in simple words.", "List three facts about {} and say why each matters.")


class Document(NamedTuple):
    source: str
    kind: str
    tokens: list[int]


@dataclass(frozen=True)
class DemoText:
    """Packed token sequences, each (sequences, length) int64; `held_out` by kind. `x.split(4)` gives batches of 4."""

    calibration: Tensor
    training: Tensor
    held_out: dict[str, Tensor]
    sources: dict[str, frozenset[str]]

    def __post_init__(self) -> None:
        for a, b in (("training", "held_out"), ("calibration", "held_out"), ("training", "calibration")):
            if shared := self.sources[a] & self.sources[b]:
                raise ValueError(f"{a} and {b} share the documents {sorted(shared)}; each may be in one of them only")


def deal(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Names per split, the largest first, each to the split that lacks most of its share.

    What exceeds a quarter of a split's share goes to training, so that no split hangs on one or two documents.
    """
    total = sum(sizes.values())
    dealt: dict[str, list[str]] = {split: [] for split in SHARES}
    filled = dict.fromkeys(SHARES, 0.0)
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        limits = {split: max(share * total / 4, min(sizes.values())) for split, share in SHARES.items()}
        open_to = [s for s in SHARES if s == "training" or sizes[name] <= limits[s]]
        split = min(open_to, key=lambda s: filled[s] / SHARES[s])
        dealt[split].append(name)
        filled[split] += sizes[name]
    return dealt


def manual_documents() -> dict[str, str]:
    """The topics of `pydoc_data.topics`; those that share a paragraph are one document, which holds it once."""
    owner: dict[str, str] = {}
    root = {topic: topic for topic in topics}

    def find(topic: str) -> str:
        while root[topic] != topic:
            topic = root[topic]
        return topic

    for topic, text in topics.items():
        for paragraph in map(_normal, text.split("\n\n")):
            # Shorter ones are headings and code such as "Example:", which independent texts share too.
            if len(paragraph) > 60:
                root[find(topic)] = find(owner.setdefault(paragraph, topic))
    merged: dict[str, dict[str, str]] = {}
    for topic, text in topics.items():
        paragraphs = merged.setdefault(find(topic), {})
        for paragraph in text.split("\n\n"):
            paragraphs.setdefault(_normal(paragraph), paragraph)
    return {topic: "\n\n".join(paragraphs.values()) for topic, paragraphs in merged.items()}


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _prompts(tokenizer: PreTrainedTokenizerBase, subjects: Sequence[str], each: int) -> dict[str, str]:
    """Prompt text by source name: `each` openers and, where the tokenizer has a chat template, questions a subject."""
    turns = [(s, i + n, f"/{n}" if n else "") for n in range(each) for i, s in enumerate(subjects)]
    prompts = {f"prose/{s}{end}": OPENERS[i % len(OPENERS)].format(s) for s, i, end in turns}
    if tokenizer.chat_template:
        for subject, i, end in turns:
            message = {"role": "user", "content": QUESTIONS[i % len(QUESTIONS)].format(subject)}
            chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            prompts[f"chat/{subject}{end}"] = str(chat)
    return prompts


def written_documents(
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    subjects: Sequence[str],
    *,
    length: int,
    each: int = 1,
    seed: int = 0,
) -> dict[str, list[Document]]:
    """What the teacher writes about each of `subjects`: kinds "prose" (it continues an opener) and "chat" (it answers),
    `each` documents of both.

    Each document is at most `length` tokens, prompt and end-of-text token included. Documents are kept under
    `cache_home()`, by the hash of the weights, the prompts, the length and the seed.
    """
    prompts = _prompts(tokenizer, subjects, each)
    encoded = [
        # How a conversation begins, the chat template alone says.
        tokenizer(text, add_special_tokens=False)["input_ids"] if kind == "chat" else encode(tokenizer, text)
        for kind, text in ((source.partition("/")[0], text) for source, text in prompts.items())
    ]
    key = fingerprint(model_identity(teacher), encoded, length, seed)
    file = cache_home() / f"written-{key[:16]}.safetensors"
    if not file.exists():
        rows = write_documents(teacher, encoded, length=length, end=tokenizer.eos_token_id, seed=seed)
        write_tensors(file, {source: torch.tensor(row) for source, row in zip(prompts, rows, strict=True)})
    stored = load_file(file)
    written: dict[str, list[Document]] = {subject: [] for subject in subjects}
    for source in prompts:
        kind, subject, *_ = source.split("/")
        written[subject].append(Document(source, kind, stored[source].tolist()))
    return written


def pack(documents: Sequence[Document], length: int, *, begin: Sequence[int] = (), seed: int | None = None) -> Tensor:
    """Documents end to end, in the order of `seed` if given, cut into sequences: (sequences, length); the rest goes.

    Each sequence begins with `begin`, the tokenizer's `opening`; the documents within it do not, since their first
    tokens are predicted from what stands before them, and no model has learnt to predict an opening.
    """
    if seed is not None:
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = [documents[i] for i in order]
    text = (without_opening(document.tokens, list(begin)) for document in documents)
    stream = torch.tensor(list(chain.from_iterable(text)), dtype=torch.int64)
    rows = cut_stream(stream, length, list(begin))
    if len(rows) == 0:
        raise ValueError(f"length={length} is more than the {len(stream)} tokens of the {len(documents)} documents")
    return rows


def demo_tokens(
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None = None,
    *,
    length: int = 256,
    subjects: int = 32,
    seed: int = 0,
) -> DemoText:
    """Text for the demo: kind "manual" (the Python manual) and, with a `teacher`, "prose" and "chat", its own writing.

    `subjects`: how many subjects the teacher writes about, two documents of at most 160 tokens each.
    Raises ValueError if `subjects` is not in 10 … 64 (fewer would leave a split without any).
    """
    if not 10 <= subjects <= len(SUBJECTS):
        raise ValueError(f"subjects={subjects} must be in 10 … {len(SUBJECTS)}")
    manual = manual_documents()
    splits: dict[str, list[Document]] = {}
    for split, names in deal({name: len(text) for name, text in manual.items()}).items():
        encoded = tokenizer([manual[name] for name in names], add_special_tokens=False)["input_ids"]
        splits[split] = [
            Document(f"manual/{name}", "manual", [*row, *ending(tokenizer)])
            for name, row in zip(names, encoded, strict=True)
        ]
    if teacher is not None:
        written = written_documents(tokenizer, teacher, SUBJECTS[:subjects], length=DOCUMENT_LENGTH, seed=seed)
        for split, names in deal(dict.fromkeys(written, 1)).items():
            splits[split] += [document for name in names for document in written[name]]
    kinds = dict.fromkeys(document.kind for document in splits["held_out"])
    begin = opening(tokenizer)
    return DemoText(
        calibration=pack(splits["calibration"], length, begin=begin, seed=seed),
        training=pack(splits["training"], length, begin=begin, seed=seed),
        held_out={kind: pack([d for d in splits["held_out"] if d.kind == kind], length, begin=begin) for kind in kinds},
        sources={split: frozenset(d.source for d in documents) for split, documents in splits.items()},
    )
