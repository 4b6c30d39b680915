"""What the documentation says of the ways to multiply 4-bit codes on sm_90, counted in what they compile to."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# What published measurements find of the e4m3 instruction's sums on sm_90: a leading bit and 13 more.
SUM_BITS = 14


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "benchmarks.kernels.low_bit.matrix_unit"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _one(ways, dtype, block_m, promoted=0, num_warps=8):
    fields = {"dtype": dtype, "block_m": block_m, "promoted": promoted, "num_warps": num_warps}
    (found,) = [way for way in ways if fields.items() <= way.items()]
    return found


def test_int8_waits_for_every_step_and_leaves_room_for_two_programs(ways):
    for warps in (4, 8):
        way = _one(ways, "i8", 128, num_warps=warps)
        assert (way["instruction"], way["waits"], way["programs"], way["spills"]) == ("IGMMA", "0", 2, 0)
    assert _one(ways, "i8", 256)["n"] == 128  # a wider tile brings no wider instruction, and no second program
    assert _one(ways, "i8", 256)["programs"] == 1


def test_16_bits_and_e4m3_leave_a_step_under_way(ways):
    for dtype, instruction in (("bf16", "HGMMA"), ("fp8e4nv", "QGMMA")):
        for block_m in (128, 256):
            way = _one(ways, dtype, block_m)
            assert (way["instruction"], way["waits"], way["n"]) == (instruction, "1", block_m)


def test_exact_sums_of_e4m3_cost_what_they_were_to_gain(ways):
    """No second program, a wait for all products in every step, and more instructions than int8."""
    int8 = _one(ways, "i8", 128)
    for block_m in (128, 256):
        way = _one(ways, "fp8e4nv", block_m, promoted=128)
        assert way["programs"] == 1
        assert "0" in way["waits"].split(",")
        assert way["per_1000_products"] > 1.5 * int8["per_1000_products"]


def test_what_e4m3_holds():
    codes = torch.arange(-16, 17).float()
    assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)
    assert float(torch.tensor(17.0).to(torch.float8_e4m3fn)) != 17.0


def _sum(products):
    """Of integers, 32 at a time as the instruction takes them: what is below bit `SUM_BITS` of the largest is cut."""
    total = 0
    for step in products.split(32):
        terms = [total, *step.tolist()]
        unit = 2 ** max(max(map(abs, terms)).bit_length() - SUM_BITS, 0)
        total = sum(int(term / unit) for term in terms) * unit
        unit = 2 ** max(abs(total).bit_length() - SUM_BITS, 0)
        total = int(total / unit) * unit
    return total


@pytest.mark.parametrize(("largest", "k"), [(64, 256), (120, 136)])
def test_where_sums_of_e4m3_stop_being_exact(largest, k):
    products = torch.full((2 * k,), largest)
    products[::2] -= 1
    for few in (products[:k], products[:k] * (-1) ** torch.arange(k), torch.full((k,), largest)):
        assert _sum(few) == int(few.sum())
    assert _sum(products) != int(products.sum())
    assert sum(_sum(part) for part in products.split(128)) == int(products.sum())


def test_an_interpreter_compiles_nothing():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.kernels.low_bit.matrix_unit"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
