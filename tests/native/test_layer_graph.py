"""The CUDA half of the runtime without a GPU: its kernels run on the CPU, against the CPU's own path."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++")
STORAGE = {"fp32": 0, "bf16": 1, "fp16": 2}
FIELDS = (
    *("storage", "heads", "key_value_heads", "head_dim", "hidden", "inner", "vocabulary", "layers", "window"),
    *("activation", "norm_after", "norm_heads", "bias", "rotary", "softcap", "sequences"),
)
SMALL = dict(zip(FIELDS, (0, 4, 2, 16, 40, 56, 99, 3, 0, 0, 0, 0, 0, 1, 0, 1), strict=True))
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 3e-3}  # caches are rounded to the storage type

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(not (ROOT / "csrc" / "cuda").exists(), reason="the sources are not at hand"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("layer_graph") / "layer_graph.so"
    here = Path(__file__).parent
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", "-w", f"-I{here / 'cuda_on_cpu'}", f"-I{ROOT / 'csrc'}",
            "-DE3_ISA_NAMESPACE=baseline", str(here / "layer_graph.cpp"),
            str(ROOT / "csrc" / "decode" / "runtime_table.cpp"), "-o", str(target),
        ],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(target))
    loaded.layer_graph_error.restype = ctypes.c_double
    return loaded


def numbers(**changes):
    return (ctypes.c_int * len(FIELDS))(*(SMALL | changes).values())


def error(library, *, tokens=1, steps=4, streams=1, **changes):
    return library.layer_graph_error(numbers(**changes), tokens, steps, streams)


MODELS = {
    "plain": {},
    "biases and a norm of each head": {"bias": 1, "norm_heads": 1},
    "norms of all heads and after the blocks": {"norm_heads": 2, "norm_after": 1},
    "softcaps and windows": {"softcap": 1, "window": 3, "activation": 1},
    "a layer without rotary embedding": {"rotary": 2, "activation": 2},
    "widths that no load divides": {"head_dim": 24, "hidden": 37, "inner": 51},
    "wide heads": {"head_dim": 256, "heads": 2, "key_value_heads": 1},
}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_gives_the_logits_of_the_cpu(library, model, storage):
    assert error(library, storage=STORAGE[storage], **MODELS[model]) <= TOLERANCE[storage]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("tokens", "sequences"), [(5, 1), (6, 3), (8, 8)])
def test_drafts_prompts_and_batches(library, tokens, sequences, storage):
    batch = {"tokens": tokens, "sequences": sequences, "layers": 2, "steps": 3}
    assert error(library, storage=STORAGE[storage], **batch) <= TOLERANCE[storage]


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_context_that_many_blocks_share(library, tokens):
    assert error(library, tokens=tokens, steps=136 // tokens, layers=1, heads=2) <= TOLERANCE["fp32"]


def test_steps_on_two_streams_do_not_meet_in_the_working_memory(library):
    assert error(library, streams=2) <= TOLERANCE["fp32"]


def test_a_step_launches_few_kernels(library):
    """Per layer nine: norm, projections, placing, attention, merging, output; norm, gate and up, down."""
    assert library.launches_of_a_step(numbers()) == 2 + 9 * SMALL["layers"] + 2
