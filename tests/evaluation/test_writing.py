import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from e3pruner import LayerSkipRuntime
from e3pruner.evaluation.prompts import rule_tasks, writing_prompts
from e3pruner.evaluation.writing import repeated_suffix, writing

TASKS = {task.kind: task for task in rule_tasks(per_kind=1, seed=3)}


@given(
    head=st.lists(st.integers(0, 9), max_size=20),
    block=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    rounds=st.integers(3, 30),
)
def test_a_loop_is_found_whatever_comes_before_it(head, block, rounds):
    found = repeated_suffix(head + block * rounds)
    if len(block) * rounds >= 24:
        assert 0 < found <= len(block)
    if found:
        tail = (head + block * rounds)[-max(24, 3 * found) :]
        assert all(a == b for a, b in zip(tail, tail[found:], strict=False))


@given(ids=st.lists(st.integers(), unique=True, max_size=200))
def test_text_that_repeats_nothing_has_no_loop(ids):
    assert repeated_suffix(ids) == 0


def test_a_loop_that_ended_is_none():
    assert repeated_suffix([7] * 40 + list(range(30))) == 0
    assert repeated_suffix([7] * 23) == 0
    assert repeated_suffix([7] * 24) == 1
    assert repeated_suffix(list(range(65)) * 4) == 0


def answers_to(task):
    numbers = [int(each) for each in "".join(c if c.isdigit() else " " for c in task.prompt).split()]
    match task.kind:
        case "sum":
            return f"The answer: {sum(numbers)}.", f"{sum(numbers) + 1}"
        case "list":
            step = numbers[1] - numbers[0]
            following = ", ".join(str(numbers[-1] + step * i) for i in (1, 2, 3))
            return f"{', '.join(map(str, numbers))}, {following}", following.replace(",", "1,", 1)
        case "json":
            name = next(word for word in task.prompt.split() if word.endswith(",") and word[0].isupper())[:-1]
            good = f'Here: ```{{"name": "{name}", "age": {numbers[0]}}}```'
            return good, good.replace("}", "")
        case "brackets":
            good = f"{list(range(numbers[0], numbers[1] + 1))}"
            return f"So: {good}", good[:-1]
        case "python":
            name = task.prompt.split("(")[0].split()[-1]
            return f"```python\ndef {name}(x):\n    return x\n```\nDone.", f"def {name}(x:\n    return x"


@pytest.mark.parametrize("kind", TASKS)
def test_a_rule_tells_right_answers_from_wrong_ones(kind):
    right, wrong = answers_to(TASKS[kind])
    assert TASKS[kind].check(right)
    assert not TASKS[kind].check(wrong)
    assert not TASKS[kind].check("")


def test_prompts_are_what_the_seed_says():
    assert [task.prompt for task in rule_tasks(seed=1)] == [task.prompt for task in rule_tasks(seed=1)]
    assert [task.prompt for task in rule_tasks(seed=1)] != [task.prompt for task in rule_tasks(seed=2)]
    assert len(set(writing_prompts())) == 32


class Letters:
    """A tokenizer of letters: what is wanted here of one, with or without a chat template."""

    eos_token_id, chat_template = 0, None

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(32 + token) for token in ids)


def test_a_random_model_writes_figures_with_errors():
    model = tiny_model("llama")
    options = {"prompts": ["one", "two two"], "tasks": list(TASKS.values()), "max_new_tokens": 40, "samples": 2}
    found = writing(model, Letters(), **options, progress=False)
    assert found.keys() == {"greedy", "sampled", "tasks", "texts"}
    assert [text["prompt"] for text in found["texts"]] == ["one", "two two"]
    assert found["tasks"].keys() == {"all", *TASKS}
    for figures in (found["greedy"], found["sampled"]):
        for value, error in figures.values():
            assert value >= 0
            assert error >= 0
    assert 0 <= found["greedy"]["loops"][0] <= 1
    assert math.isnan(found["tasks"]["sum"]["pass@1"][1])  # of a single task
    torch.manual_seed(5)  # the caller's generator decides nothing
    assert str(writing(model, Letters(), **options, progress=False)) == str(found)


def test_padding_changes_no_greedy_answer():
    model = tiny_model("llama")
    options = {"tasks": [], "max_new_tokens": 12, "samples": 1, "progress": False}
    both = writing(model, Letters(), prompts=["abc", "a longer prompt"], **options)["greedy"]["distinct_bigrams"][0]
    alone = [
        writing(model, Letters(), prompts=[prompt], **options)["greedy"]["distinct_bigrams"][0]
        for prompt in ("abc", "a longer prompt")
    ]
    assert both == pytest.approx(sum(alone) / 2)


def test_the_runtime_writes_the_same_greedy_text():
    model = tiny_model("llama")
    options = {"prompts": ["abc", "a longer prompt"], "tasks": [], "max_new_tokens": 30, "samples": 2}
    by_model, by_runtime = (
        writing(each, Letters(), **options, progress=False) for each in (model, LayerSkipRuntime(model))
    )
    assert by_runtime["greedy"] == by_model["greedy"]
    assert by_runtime["sampled"].keys() == by_model["sampled"].keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a positive integer"),
        ({"samples": True}, "samples=True must be"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"prompts": ["a", " "]}, r"prompts\[1\] holds no text"),
    ],
)
def test_bad_arguments_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        writing(tiny_model("llama"), Letters(), **given, progress=False)
