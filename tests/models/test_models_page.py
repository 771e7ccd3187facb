"""docs/models.md is the page of the record bench/results/models.json."""

import json

from sweep.page import PAGE, RECORDS, page


def test_the_page_of_model_types_is_that_of_the_record():
    records = [json.loads(record.read_text(encoding="utf-8")) for record in RECORDS]
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(*records), "python -m tests.sweep.page"
    assert written.count("\n| `") == sum(len(record["types"]) for record in records)


def test_a_reason_stays_one_cell_of_its_row():
    checks = {"prune": "ok: layers |1| stay", "search": "late: a_b"}
    record = {"mapping": "causal", "transformers": "5", "torch": "2", "python": "3", "commit": "abc"}
    written = page(record | {"types": {"llama": {"outcome": "late", "checks": checks}}})
    assert "| `llama` | yes | – | – | late | – | layers \\|1\\| stay; a\\_b |" in written
    assert "1 at abc" in written
