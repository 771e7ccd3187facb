"""The profile of the operations."""

from dataclasses import replace

import pytest

from e3kernels.registration import OPERATORS
from e3pruner.profiling import fit
from e3pruner.profiling.operations.page import operations_page
from e3pruner.profiling.operations.profile import CASES, OperationsProfile, profile_operations
from e3pruner.profiling.page import write_page
from e3pruner.report import describe_environment

SMALL = {"rows": 4, "vocabulary": 40, "hidden": 16, "providers": ["reference", "eager"], "rounds": 1}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    return profile_operations(**SMALL, folder=folder), folder


def test_every_operation_has_a_row_for_each_dtype_and_provider(profile):
    assert set(CASES) == set(OPERATORS)
    rows = [(r.operation, r.dtype, r.provider) for r in profile[0].rows]
    assert rows == [(o, d, p) for o in CASES for d in ("float32", "bfloat16") for p in SMALL["providers"]]


def test_rows_are_exact_in_fp32_and_rounded_in_bf16(profile):
    for row in profile[0].rows:
        if row.provider == "reference":  # what a textbook's rounding does to its result is its own affair
            assert max(row.errors) < {"float32": 1e-3, "bfloat16": 0.05}[row.dtype], row
        assert row.host > 0
        assert row.share == pytest.approx(row.rate / row.limit)
        assert row.quartiles[0] <= row.quartiles[1]
    assert {(r.operation, r.provider) for r in profile[0].rows if r.errors is None} == {("gumbel_topk", "eager")}


def test_the_page(profile, tmp_path):
    page = operations_page(profile[0], "operations")
    text = write_page(page, tmp_path, describe_environment(), "e3 profile ops").read_text()
    assert "linear_topk_kl, bfloat16, eager" in text
    assert (profile[1] / "trace.json").exists()


def test_a_time_that_drowned_is_no_number(profile):
    """Neither its rate nor its share of the ceiling, which the first sentence named."""
    row = replace(profile[0].rows[0], seconds=1.0, quartiles=(0.9, 3.9), rounds=5, share=7.0)
    page = operations_page(OperationsProfile([row], profile[0].ceilings), "operations")
    (cells,) = page.sections[1].tables[0].rows
    assert cells.count("not known") == 3
    assert page.summary == "No operation's time is known."


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"operations": ["softmax"]}, "operations has 'softmax'; choose of gumbel_topk"),
        ({"providers": ["cuda"]}, "providers has 'cuda'; choose of reference, native, triton, eager"),
        ({"dtypes": ["int8"]}, "dtypes has 'int8'; choose of float32"),
    ],
)
def test_unknown_names_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        profile_operations(**(SMALL | wrong))


def test_a_shape_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(fit, "available", lambda device: 1 << 10)
    with pytest.raises(ValueError, match="rows=4 with vocabulary=40 needs about"):
        profile_operations(**SMALL)
