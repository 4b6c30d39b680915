"""What importing a part of the package takes along."""

import subprocess
import sys

import pytest

LEARNING = ("sliderquant.refine", "sliderquant.quantizer.fake_quantize", "sliderquant.quantizer.compiled_function")


@pytest.mark.parametrize("module", ["sliderquant.loading", "sliderquant.checkpoint", "sliderquant.warming"])
def test_running_a_model_imports_nothing_of_learning(module):
    code = f"import sys, {module}; print(*(name for name in sys.modules if name.startswith('sliderquant')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert module in done.stdout.split()
    assert [name for name in done.stdout.split() if name.startswith(LEARNING)] == []


def test_help_imports_no_torch():
    code = "import sys, sliderquant.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
