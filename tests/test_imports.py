"""What importing a part of the package takes along."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

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


@pytest.mark.parametrize(
    ("folder", "package"), [("kernels", "sliderquant_kernels"), (".", "sliderquant"), (".", "benchmarks")]
)
def test_folders_import_each_other_in_no_circle(folder, package):
    """Files at the top of a package count one by one, folders as a whole, with the imports inside functions."""
    top = ROOT / folder / package
    needs: dict[str, set[str]] = {}
    for path in top.rglob("*.py"):
        inside = path.relative_to(top).parts
        if path.name in ("__init__.py", "__main__.py"):
            continue
        needed = needs.setdefault(_room(inside), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for parts in _imported(node, (package, *inside)):
                if parts[0] == package and len(parts) > 1:
                    needed.add(_room((*parts[1:], "")) if (top / parts[1]).is_dir() else parts[1])
        needed.discard(_room(inside))
    list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle
    assert len(needs) > 5


def _room(inside: tuple[str, ...]) -> str:
    return inside[0].removesuffix(".py")


def _imported(node: ast.AST, place: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Modules and names that a node imports, in parts; `place`: of the file, from its package on."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        start = place[: len(place) - node.level] if node.level else ()
        module = node.module.split(".") if node.module else []
        return [(*start, *module, alias.name) for alias in node.names]
    return []
