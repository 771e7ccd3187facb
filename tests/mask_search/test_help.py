"""`help(e3pruner.search)` names every method of ours, its options and their defaults, as the code has them."""

import pydoc

import pytest

import e3pruner
from e3pruner.mask_search import METHODS

HELP = pydoc.plain(pydoc.render_doc(e3pruner.search))


@pytest.mark.parametrize("name", METHODS)
def test_help_names_a_method_its_options_and_what_it_does(name: str) -> None:
    method = METHODS[name]
    options = ", ".join(f"{option}={default!r}" for option, default in method.options.items()) or "no options"
    assert f"{name}: {options}\n" in HELP
    assert method.about.endswith(".")
    assert method.about in HELP
