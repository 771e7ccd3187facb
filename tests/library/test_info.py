import json
import subprocess
import sys

import torch

import e3kernels as e3k
from e3kernels.registration import OPERATORS


def test_info_names_a_backend_and_a_reason_for_every_operation():
    report = e3k.info()
    assert set(report["operations"]) == set(OPERATORS)
    for devices in report["operations"].values():
        assert devices["cpu"]["backend"] in ("reference", "native")
        assert devices["cpu"]["reason"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert set(report["native_modules"]) == {"_ops", "_runtime"}
    assert report["build"]["torch"]
    assert all(isinstance(name, str) for name in report["cpu"]["instruction_sets"])
    assert set(report["caches"]) == {"triton", "torch.compile"}


def test_info_reports_a_backend_that_cannot_serve():
    with e3k.use_backend("triton"):
        report = e3k.info()
    assert report["requested_backend"] == "triton"
    for devices in report["operations"].values():
        assert devices["cpu"]["backend"] == "triton" or "cannot serve" in devices["cpu"]["reason"]


def test_module_prints_text_and_json():
    def run(*options):
        command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "e3kernels.info", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "gumbel_topk:" in run()
    assert set(json.loads(run("--json"))) == set(e3k.info())
