"""Twenty prompts of CPython's own documentation, on every machine the same."""

from pydoc_data.topics import topics

COUNT = 20
CHARACTERS = 200


def prompts() -> list[str]:
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))[:COUNT]
    return [topics[name][CHARACTERS : 2 * CHARACTERS] for name in names]
