"""The Python of README.md and docs/*.md runs as it stands, and the pages about the code say what it declares.

A block behind `<!-- needs: MODULE -->` runs where that module can be imported and is skipped elsewhere; one behind
`<!-- needs: any other words -->` is always skipped. The other blocks of a page run one after the other, on the names of
`given`, in an empty folder.
"""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from cli.conftest import byte_tokenizer
from tiny_models import tiny_model

import e3kernels
import e3pruner
from e3pruner import models

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^\n]*?) -->\n+)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """(line in the page, source, what it needs or "") of each block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start("code")].count("\n"), m["code"], m["needs"] or "") for m in BLOCK.finditer(text)]


def lacks(needs):
    return bool(needs) and (not needs.isidentifier() or importlib.util.find_spec(needs) is None)


def runs(page):
    return [(line, code) for line, code, needs in blocks(page) if not lacks(needs)]


def cases():
    """(page, whether on the real model) of each page with Python to run."""
    for page in PAGES:
        if found := runs(page):
            yield pytest.param(page, False, id=page.stem)
            if any("load_smollm2" in code for _, code in found):
                yield pytest.param(page, True, id=f"{page.stem}-smollm2", marks=pytest.mark.slow)


def given():
    """What the pages take for granted: a model with its tokenizer, tokens, a plan, and the model cut by it."""
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    tokens = torch.randint(3, len(tokenizer), (8, 16), generator=torch.Generator().manual_seed(0))
    plan = e3pruner.PruningPlan.of_removed([2, 3], 6)
    return {
        **{"torch": torch, "e3kernels": e3kernels, "e3pruner": e3pruner, "model": model, "tokenizer": tokenizer},
        **{"tokens": tokens, "calibration": tokens, "held_out": tokens[:2], "manual": tokens[:4], "code": tokens[4:]},
        **{"transformers": transformers, "plan": plan, "pruned": e3pruner.prune(model, plan)},
    }


@pytest.mark.parametrize(("page", "real"), list(cases()))
def test_the_python_of_a_page_runs(page, real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    if not real:
        deep = tiny_model(
            "llama", vocab_size=len(names["tokenizer"]), max_position_embeddings=512, num_hidden_layers=10
        )
        monkeypatch.setattr(models, "load_smollm2", lambda: (deep, names["tokenizer"]))
    Path("chats.jsonl").write_text("\n".join(json.dumps({"text": "A page of text. " * 3}) for _ in range(12)))
    for name in ("pruned", "model"):
        names[name].save_pretrained(name)
        names["tokenizer"].save_pretrained(name)
    for line, code in runs(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # so that an error names the page's line


@pytest.mark.parametrize(
    "needs", [pytest.param(n, id=f"{p.stem}:{line}") for p in PAGES for line, _, n in blocks(p) if lacks(n)]
)
def test_a_block_that_needs_more(needs):
    pytest.skip(f"needs {needs}")


def test_every_block_is_found():
    for page in PAGES:
        assert len(blocks(page)) == page.read_text(encoding="utf-8").count("\n```python\n"), page


@pytest.mark.parametrize("name", ["search-options.md", "engine-rules.md"])
def test_a_page_is_what_the_code_says(name):
    code = runpy.run_path(str(ROOT / "docs" / "scripts" / "from_code.py"))
    assert (code["FOLDER"] / name).read_text(encoding="utf-8") == code["pages"]()[name], "run docs/scripts/from_code.py"
