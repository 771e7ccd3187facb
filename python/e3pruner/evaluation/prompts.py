"""Prompts made by rule: questions to write about, and small tasks whose answer a rule can check."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

_SUBJECTS = ("a river", "bread", "the moon", "a library", "winter", "a bicycle", "the sea", "a market")
_QUESTIONS = (
    "Write a short paragraph about {}.",
    "Explain to a child what is special about {}.",
    "List five facts about {}.",
    "Tell a story that begins with {}.",
)
_NAMES = ("Anna", "Ben", "Chen", "Dora", "Emil", "Fatima")


@dataclass(frozen=True)
class Task:
    """A prompt, and whether an answer to it is right."""

    kind: str
    prompt: str
    check: Callable[[str], bool]


def writing_prompts() -> list[str]:
    """32 requests for free text."""
    return [question.format(subject) for question, subject in product(_QUESTIONS, _SUBJECTS)]


def rule_tasks(per_kind: int = 16, seed: int = 0) -> list[Task]:
    """`per_kind` tasks of each kind, drawn by `seed`: sums, list continuations, JSON objects, brackets, Python."""
    draw = random.Random(seed)
    return [make(draw) for make in (_sum, _continuation, _json, _brackets, _python) for _ in range(per_kind)]


def _sum(draw: random.Random) -> Task:
    a, b = draw.randint(2, 40), draw.randint(2, 40)
    return Task("sum", f"What is {a} + {b}? Answer with the number only.", lambda text: _integers(text)[:1] == [a + b])


def _continuation(draw: random.Random) -> Task:
    start, step = draw.randint(1, 9), draw.randint(1, 9)
    given, wanted = ([start + step * i for i in numbers] for numbers in (range(5), range(5, 8)))

    def check(text: str) -> bool:
        found = _integers(text)
        return found[len(given) if found[: len(given)] == given else 0 :][:3] == wanted

    prompt = f"Continue this list with the next three numbers: {', '.join(map(str, given))}"
    return Task("list", prompt, check)


def _json(draw: random.Random) -> Task:
    wanted = {"name": draw.choice(_NAMES), "age": draw.randint(18, 80)}
    prompt = f"Write a JSON object with the keys name and age for {wanted['name']}, who is {wanted['age']}. Only JSON."
    return Task("json", prompt, lambda text: _first_json(text, "{") == wanted)


def _brackets(draw: random.Random) -> Task:
    first = draw.randint(1, 20)
    wanted = list(range(first, first + 6))
    prompt = f"Write the whole numbers from {first} to {first + 5} as one list in square brackets, with commas."
    return Task("brackets", prompt, lambda text: _first_json(text, "[") == wanted)


def _python(draw: random.Random) -> Task:
    number = draw.randint(2, 99)
    name = f"{draw.choice(('add', 'subtract', 'multiply_by'))}_{number}"
    prompt = f"Write a Python function {name}(x) that does what its name says. Only code."
    return Task("python", prompt, lambda text: _defines(text, name))


def _integers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"-?\d+", text)]


def _first_json(text: str, opening: str) -> object:
    """The first JSON value that begins with `opening`; None if there is none that parses."""
    start = text.find(opening)
    try:
        return json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except (json.JSONDecodeError, RecursionError):
        return None


def _defines(text: str, name: str) -> bool:
    """Whether `text`, or the first block of code in it, is Python that defines the function `name`; nothing is run."""
    block = re.search(r"```(?:python)?\n(.*?)(?:```|$)", text, re.DOTALL)
    try:
        tree = ast.parse(block[1] if block else text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree))
