"""The kernels compile for GPUs that are not here, do not spill, and use the matrix unit."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_MATRIX = {"sm_80": {"HMMA"}, "sm_90": {"HMMA", "HGMMA"}, "sm_120": {"HMMA"}}


def _run(tmp_path, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "sliderquant_kernels.inspect", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_default_grid_compiles_without_spills(tmp_path):
    done = _run(tmp_path, "--json", *(f"--arch={arch}" for arch in _MATRIX))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert {row["arch"] for row in rows} == set(_MATRIX)
    for row in rows:
        assert not row["error"]
        assert row["spills"] == 0
        assert 0 < row["registers"] <= 255
        assert row["instructions"] > 100
        if row["op"] == "weight_only_linear" and "float32" not in row["shape"]:
            assert row["matrix_instruction"] in _MATRIX[row["arch"]], row
        else:
            # TF32 is a matrix instruction: fp32 must not use one.
            assert row["matrix_instruction"] == "none", row


def test_interpreted_kernels_are_refused(tmp_path):
    done = _run(tmp_path, "--arch=sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
