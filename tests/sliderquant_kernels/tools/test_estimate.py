"""The command that prints estimates."""

import pytest
import torch

from sliderquant_kernels.common.choices import Device, Problem
from sliderquant_kernels.tools import estimate
from sliderquant_kernels.weight_only import tiles


def test_the_command_prints_what_the_rules_choose(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["estimate", "--shape", "14336x4096", "--bits", "4", "2", "--tokens", "1", "64"])
    estimate.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    found = tiles.choose(Problem(1, 14336, 4096, 4, 128, False, torch.bfloat16), Device.typical(90))
    assert f"{found.variant} {found.block_m} x {found.row_blocks * 16}, {found.num_warps} warps" in lines[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--shape", "4096"], "expected NxK such as 14336x4096"),
        (["--shape", "4096x4100"], "K a multiple of 128, got '4096x4100'"),
        (["--bits", "5"], "invalid choice: 5"),
        (["--tokens", "128"], "invalid choice: 128"),
    ],
)
def test_arguments_that_cannot_be_meant(words, error, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["estimate", *words])
    with pytest.raises(SystemExit):
        estimate.main()
    assert error in capsys.readouterr().err
