"""The kernels compile for GPUs that are not here: no spills, the right matrix instruction, within their budgets."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.random_model import SHAPES
from sliderquant_kernels.common.choices import Choice, Problem
from sliderquant_kernels.tools import inspect, sass
from sliderquant_kernels.tools.model_problems import MODELS, model_cases
from sliderquant_kernels.tools.problems import Case
from sliderquant_kernels.weight_only import estimate

# What may multiply, by op and kernel: warps that split K stay on the instruction of a warp; the others take the widest
# there is.
_PLAIN = {"weight_only_linear": "HMMA", "low_bit_linear": "IMMA"}


def _matrix_instruction(arch, op, variant):
    plain = _PLAIN[op]
    if variant == "warp_k" or arch not in ("sm_90", "sm_100"):
        return plain
    return f"UTC{plain}" if arch == "sm_100" else f"{plain[0]}GMMA"


def _run(tmp_path, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "sliderquant_kernels.inspect", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("arch", inspect.ARCHITECTURES)
def test_grid(arch, tmp_path):
    """All of the default grid on sm_90; on the others the main job, one dequantization, and low-bit linears."""
    rest = [] if arch == "sm_90" else ["--match", r"^W4-(g128|channel)-asym bfloat16 (M=(1|16|32|64|4096) )?large$"]
    done = _run(tmp_path, "--json", f"--arch={arch}", *rest)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert {row["arch"] for row in rows} == {arch}
    variants = set()
    for row in rows:
        variant = row["choice"]["variant"]
        variants.add((row["op"], variant))
        if variant == "dense":
            continue
        assert not row["error"]
        assert row["spills"] == 0
        assert 0 < row["registers"] <= 255
        assert row["instructions"] > 100
        if row["op"] not in _PLAIN:
            continue
        assert row["matrix_instruction"] == _matrix_instruction(arch, row["op"], variant), row
        # tcgen05 takes no weight from registers, nor do tiles of expanded codes; 8-bit codes need no unpacking at all.
        if not row["matrix_instruction"].startswith("UTC") and variant != "tiles" and "W8-channel" not in row["shape"]:
            assert row["weights_from"] == "registers", row
        if row["op"] == "weight_only_linear":
            _check_main_job(arch, row)
            _check_estimate(arch, row)
        _check_waits(row)
    wanted = {("weight_only_linear", name) for name in ("warp_k", "rows", "dense")} | {("dequantize", "dequantize")}
    assert wanted | {("low_bit_linear", "warp_k"), ("low_bit_linear", "rows")} <= variants


def _check_main_job(arch, row):
    """W4A16-g128, bf16, zero-points, even shapes: at most 90 instructions per 16 packed bytes for decoding and 115 up
    to 32 tokens; 80 on sm_100, which moves more bytes for each instruction. 64 KB in flight on sm_90."""
    words = row["shape"].split()
    if words[:2] != ["W4-g128-asym", "bfloat16"] or words[3] not in ("large", "small") or len(words) > 4:
        return
    tokens = int(words[2].removeprefix("M="))
    if tokens <= 8:
        assert row["per_16_bytes"] <= (80 if arch == "sm_100" else 90), row
    elif tokens <= 32:
        assert row["per_16_bytes"] <= 115, row
    if arch == "sm_90" and tokens <= 32:
        assert row["in_flight"] >= 64 * 1024, row


def _check_estimate(arch, row):
    """The estimate counts as many programs on a multiprocessor as the compiler's shared memory and registers allow."""
    problem = next(case.problem for case in inspect.GRIDS[row["op"]](False) if case.describe() == row["shape"])
    if arch == "sm_90" and problem.m <= estimate.MAX_TOKENS:
        choice = Choice(**row["choice"])
        taken = estimate._Resources(row["registers"], row["registers"], 0.0)
        assert estimate._programs(problem, choice, taken) == row["programs"], row


def _check_waits(row):
    """Triton waits for all wgmma products in every step, of int8 always and of 16 bits in groups, whose sums it scales:
    what runs meanwhile is another program, of which the largest tiles must leave room for one. It waits once for every
    128 inputs of a group."""
    if "GMMA" in row["matrix_instruction"]:
        bits, group_size = re.match(r"W(\d)-(?:g(\d+)|channel)", row["shape"]).groups()
        found, weight_only = row["waits"].split(","), row["op"] == "weight_only_linear"
        inputs = {2: 256, 3: 256, 4: 128, 8: 64}[int(bits)] if weight_only else 128
        joined = ["0"] * (inputs // min(int(group_size or 128), 128, inputs))
        if not weight_only and group_size is not None:  # plane by plane
            assert set(found) == {"0"}, row
        elif weight_only and group_size is None:  # or some products may be under way after every wait
            assert found == joined or "0" not in found, row
        else:
            assert found == joined, row
    else:
        assert row["waits"] == "-", row
    if row["op"] == "low_bit_linear" and row["choice"]["block_m"] == 128:
        assert row["programs"] == 2, row


def test_what_was_kept_is_not_compiled_again(tmp_path):
    """The layers of two models, which share most of their code."""
    keep = tmp_path / "rows.jsonl"
    arguments = ("--models", "SmolLM2-135M", "Qwen2.5-0.5B", "--arch=sm_80", "--op=rotary", "--op=decode_attention",
                 "--json", f"--keep={keep}")  # fmt: skip
    first = _run(tmp_path / "first", *arguments)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)
    assert [(row["op"], row["shape"]) for row in rows] == [
        ("rotary", "bfloat16 K=64"), ("decode_attention", "bfloat16 K=64 groups=3"),
        ("decode_attention", "bfloat16 K=64 join"), ("decode_attention", "bfloat16 K=64 groups=7"),
    ]  # fmt: skip
    lines = keep.read_text(encoding="utf-8").splitlines()
    again = _run(tmp_path / "second", *arguments)
    assert (again.returncode, json.loads(again.stdout)) == (0, rows), again.stderr
    assert not list((tmp_path / "second").rglob("*.cubin"))
    # One line is cut, and one is another's: these two are compiled once more.
    damaged = [line if f'"key": "{json.loads(lines[0])["key"]}"' not in line else line[:50] for line in lines]
    keep.write_text("\n".join([*damaged[:-1], damaged[-1].replace("registers", "x")]), encoding="utf-8")
    mended = _run(tmp_path / "third", *arguments)
    assert (mended.returncode, json.loads(mended.stdout)) == (0, rows), mended.stderr
    assert len(list((tmp_path / "third").rglob("*.cubin"))) == 2
    assert set(lines) < set(keep.read_text(encoding="utf-8").splitlines())


def test_files_that_inspect_has_not_written_are_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "_compiled", lambda *_: pytest.fail("compiled"))
    case = (Case("weight_only_linear", Problem(1, 4096, 4096, 4, 128, True, torch.bfloat16)), "sm_80")
    for text in ("something else\n", '{"key": "a", "registers": null}\n', "[" * 100_000):
        (tmp_path / "file").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="expected rows that inspect has written"):
            inspect.inspect_grid([case], tmp_path / "file")
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    monkeypatch.setattr(inspect, "launch_key", lambda *_: "key")
    for path in (tmp_path, tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError, match=r"file|directory"):
            inspect.inspect_grid([case], path)


def test_failures_are_not_kept(tmp_path, monkeypatch):
    case = (Case("weight_only_linear", Problem(1, 4096, 4096, 4, 128, True, torch.bfloat16)), "sm_80")
    monkeypatch.setattr(inspect, "launch_key", lambda *_: "key")
    monkeypatch.setattr(inspect, "_compiled", lambda row, _: replace(row, error="no space left"))
    assert inspect.inspect_grid([case], tmp_path / "file")[0].error == "no space left"
    monkeypatch.setattr(inspect, "_compiled", lambda row, _: replace(row, registers=7))
    assert inspect.inspect_grid([case], tmp_path / "file")[0].registers == 7
    assert len((tmp_path / "file").read_text(encoding="utf-8").splitlines()) == 1


KEYS = """
from dataclasses import replace
import torch
from sliderquant_kernels.tools.inspect import _key
from sliderquant_kernels.common.compiling import launch_key
from sliderquant_kernels.tools.launches import describe_launch
from sliderquant_kernels.tools.problems import Case
from sliderquant_kernels.weight_only.tiles import Choice, Problem

def launch(m=1, n=28672, bits=4, stages=3, warps=4):
    problem = Problem(m, n, 4096, bits, 128, False, torch.bfloat16)
    return describe_launch(Case("weight_only_linear", problem), 80, Choice("warp_k", 8, 4, warps, stages))

one = launch_key(launch(), 80)
assert one == launch_key(launch(m=5, n=57344), 80)
limited = replace(launch(), options={**launch().options, "maxnreg": 9})
others = [launch_key(launch(), 90), launch_key(launch(n=28673), 80), launch_key(launch(bits=8), 80),
          launch_key(launch(stages=4), 80), launch_key(limited, 80)]
assert len({one, *others}) == 6
rounds = [describe_launch(Case("quantize_activations", Problem(1, 0, k, 4, None, False, torch.bfloat16)), 80)
          for k in (3584, 4096)]
assert launch_key(rounds[0], 80) == launch_key(rounds[1], 80) and _key("sm_80", rounds[0]) != _key("sm_80", rounds[1])
print("fine")
"""


def test_what_compiles_to_the_same():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", KEYS], env=env, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--match", "("), "'(' is no regular expression"),
        (("--match", "M=7"), "nothing fits --op and --match"),
        (("--keep", "/nowhere/rows.jsonl"), "--keep /nowhere/rows.jsonl: No such file or directory; name a file that"),
        (("--full", "--models"), "not allowed with argument"),
        (("--models", "GPT-5"), "invalid choice: 'GPT-5'"),
    ],
)
def test_arguments_that_cannot_be_meant(words, error, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(inspect, "launch_key", lambda *_: "key")
    with pytest.raises(SystemExit):
        inspect.main(["--op", "weight_only_linear", *words])
    assert error in capsys.readouterr().err


def test_launches_that_compile_to_the_same_do_so_once(monkeypatch):
    def row(m, n, arch="sm_90"):
        return Case("weight_only_linear", Problem(m, n, 4096, 4, 128, False, torch.bfloat16)), arch

    compiled = []
    monkeypatch.setattr(inspect, "launch_key", lambda launch, arch: f"{arch} {launch.constants} {launch.options}")
    monkeypatch.setattr(inspect, "_compiled", lambda row, _: compiled.append(row.arch) or replace(row, registers=100))
    rows = inspect.inspect_grid([row(1, 28672), row(2, 28672), row(1, 57344), row(1, 28672, "sm_80"), row(32, 28672)])
    assert sorted(compiled) == ["sm_80", "sm_90", "sm_90"]
    assert {found.registers for found in rows} == {100}
    assert [found.shape.split()[2:] for found in rows] == [
        ["M=1", "large"], ["M=2", "large"], ["M=1", "57344x4096"], ["M=1", "large"], ["M=32", "large"]
    ]  # fmt: skip
    assert rows[4].choice.block_m == 32


def test_the_problems_of_models():
    llama = MODELS["Llama-3-8B"]
    shape = SHAPES["llama-3-8b"]
    assert (llama.hidden, llama.intermediate, llama.heads, llama.kv_heads) == tuple(
        shape[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    assert llama.linears() == {
        "qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "gate_up_proj": (28672, 4096), "down_proj": (4096, 14336)
    }  # fmt: skip
    both = list(model_cases(("Llama-3-8B", "Qwen3-30B-A3B"), inspect.OPS))
    assert len(both) == len(set(both))
    # Their attention's output is rounded alike, and their heads are of one size.
    assert sum(case.describe() == "A4-asym bfloat16 K=4096" for case in both) == 1
    assert {case.problem.group_size for case in model_cases(("SmolLM2-135M",), ("dequantize",))} == {64, 128, 32}
    assert {case.op for case in model_cases(("Qwen2.5-7B",), ("rotary", "silu_mul"))} == {"rotary", "silu_mul"}
    assert "second" in {case.variant for case in model_cases(("Qwen2.5-32B",), ("hadamard_quantize",))}
    assert "second" not in {case.variant for case in model_cases(("Qwen2.5-7B",), ("hadamard_quantize",))}


def test_budgets_may_only_shrink(tmp_path):
    row = inspect.Row("sm_90", "weight_only_linear", "W4", Choice("warp_k"), per_16_bytes=70.0)
    path = tmp_path / "budgets.json"
    inspect.write_budgets([row], path)
    budgets = json.loads(path.read_text(encoding="utf-8"))
    assert inspect.over_budget([row], budgets) == []
    worse = inspect.replace(row, per_16_bytes=70.1)
    assert inspect.over_budget([worse], budgets) == [
        "sm_90 weight_only_linear W4: 70.1 instructions per 16 packed bytes, the budget is 70.0"
    ]
    inspect.write_budgets([worse], path)
    assert json.loads(path.read_text(encoding="utf-8"))["per_16_bytes"] == {row.key: 70.0}
    assert inspect.over_budget([worse], {**budgets, "triton": "another"}) == []
    assert inspect.over_budget([inspect.replace(row, per_16_bytes=78.0)], {**budgets, "triton": "another"})


def test_a_release_may_have_budgets_of_its_own(tmp_path, monkeypatch):
    row = inspect.Row("sm_100", "weight_only_linear", "W4", Choice("rows"), per_16_bytes=90.0)
    own = {"3.8": {"per_16_bytes": {row.key: 90.0}}}
    budgets = {"triton": "3.9.0", "releases": own, "per_16_bytes": {row.key: 70.0}}
    monkeypatch.setattr("triton.__version__", "3.8.0")
    assert inspect.over_budget([row], budgets) == []
    assert "the budget is 90.0" in inspect.over_budget([inspect.replace(row, per_16_bytes=90.1)], budgets)[0]
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(budgets), encoding="utf-8")
    monkeypatch.setattr("triton.__version__", "3.9.0")
    assert "the budget is 70.0" in inspect.over_budget([row], budgets)[0]
    inspect.write_budgets([row], path)
    assert json.loads(path.read_text(encoding="utf-8")) == {**budgets, "per_element": {}}


def test_every_quick_case_has_a_budget():
    budgets = json.loads(inspect.BUDGETS.read_text(encoding="utf-8"))["per_16_bytes"]
    wanted = {
        f"{arch} {case.op} {case.describe()}"
        for arch in inspect.ARCHITECTURES
        for case in inspect.cases(("weight_only_linear", "low_bit_linear"))
        if case.problem.m < 4096
    }
    assert wanted <= set(budgets)


def test_where_the_weight_comes_from():
    """A fragment that arithmetic made, and one that was loaded from shared memory."""

    def code(*lines):
        instructions = [(16 * i, *line) for i, line in enumerate(lines)]
        return sass.MachineCode((*instructions, (16 * len(lines), "BRA", " 0x0")), 32, 0)

    product = ("HMMA.16816.F32.BF16", " R4, R8, R12, R4")
    dequantized = code(("LDSM.16.M88.4", " R12, [R2]"), ("HADD2.BF16", " R8, R20, R21"), product)
    assert dequantized.weights_from() == "registers"
    assert code(("LDSM.16.M88.4", " R8, [R2]"), product).weights_from() == "shared"
    # Written at the end of the iteration before.
    assert code(product, ("LDS.128", " R8, [R2]")).weights_from() == "shared"
    group = ("HGMMA.64x16x16.F32.BF16", " R24, R4, gdesc[UR8]")
    assert code(group).weights_from() == "registers"
    assert code((group[0], " R24, gdesc[UR4], gdesc[UR8]")).weights_from() == "shared"
    assert code(("UTCHMMA", " gdesc[UR4], tmem[UR5]")).weights_from() == "shared"
    assert code(("FFMA", " R1, R2, R3, R1")).weights_from() == "-"


def test_how_products_are_waited_for():
    def code(*lines):
        instructions = [(16 * i, *line) for i, line in enumerate(lines)]
        return sass.MachineCode((*instructions, (16 * len(lines), "BRA", " 0x0")), 32, 0)

    group = ("IGMMA.64x128x32.S8.S8", " R24, gdesc[UR8], R24, gsb0")
    copies = ("DEPBAR.LE", " SB0, 0x2")
    assert code(copies, group, ("WARPGROUP.DEPBAR.LE", " gsb0, 0x1")).waits() == "1"
    step = (group, ("WARPGROUP.DEPBAR.LE", " gsb0, 0x0"))
    assert code(copies, *step, *step).waits() == "0,0"
    assert code(copies, group).waits() == "-"
    assert code(("IMMA.16832.S8.S8", " R4, R8, R12, R4"), copies).waits() == "-"


def test_blocks_behind_the_end_are_no_loops():
    """Two products before a loop of one are waited for behind the end of the kernel, from where a branch leads back."""
    product, wait = ("UTCHMMA", " gdesc[UR4], tmem[UR5]"), ("SYNCS.PHASECHK.TRANS64.TRYWAIT", " P0, [UR6]")
    lines = [wait, product, product, wait, product, wait, ("BRA", " 0x40"), ("EXIT", ""), wait, ("BRA", " 0x0")]
    code = sass.MachineCode(tuple((16 * i, *line) for i, line in enumerate(lines)), 32, 0)
    assert code.loop_count() == 3


def test_only_a_stack_that_is_used_is_a_spill():
    def code(opcode):
        return sass.MachineCode(((0, opcode, " R1, R2"),), 32, 8)

    assert code("STL").spilled() == 8
    assert code("FADD").spilled() == 0


def test_interpreted_kernels_are_refused(tmp_path):
    done = _run(tmp_path, "--arch=sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
