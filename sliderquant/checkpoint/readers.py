"""Who reads a checkpoint, and what they compute with it.

One pure function, `readers`, from what is quantized to a verdict for every reader. `--dry-run`, `sliderquant inspect`,
the model card and the table in the documentation print what it returns.

What it says of vLLM follows from the order in which vLLM tries its kernels. On a GPU, weight-only kernels come in the
order Machete, Marlin, ..., Humming. vLLM gives them packed models with symmetric quantized activations too: only
Humming then rounds the activations, and it is the last that is asked.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch

from sliderquant.checkpoint.config import Entry
from sliderquant.checkpoint.packing import INT8
from sliderquant.errors import InputError
from sliderquant.schemes import ACTIVATION_BITS, BITS, GROUP_SIZES, Scheme

__all__ = ["Reader", "Verdict", "readers", "readers_table"]

VLLM_VERSION, TRANSFORMERS_VERSION = "0.32", "5.24"
"""The releases of which the table below holds: read in their sources, and run on a CPU."""

_PLAIN = Entry()


class Verdict(str, Enum):
    """What a reader does with a checkpoint, from best to worst."""

    RUNS = "runs it"
    """What it computes is the model."""

    DENSE = "reads it, dense"
    """It dequantizes the weights when it loads them: the memory of the original model."""

    LEAVES_OUT = "leaves activations in 16 bits"
    """It says nothing, and computes another model than the one that was quantized."""

    MISREADS = "misreads it"
    """It warns and goes on, with weights that are not those of the model."""

    REFUSES = "refuses it"

    def __str__(self) -> str:
        return self.value


_ORDER = list(Verdict)
_Judged = tuple[Verdict, str]


@dataclass(frozen=True)
class Reader:
    """What one reader does with a checkpoint.

    Attributes:
        name: `sliderquant`, `vLLM` or `transformers`.
        since: the release that this was checked with, and later ones; empty: of this release of sliderquant.
        hardware: what it runs on.
        verdict: what it does.
        how: its kernels, what it needs, or why not.
    """

    name: str
    since: str
    hardware: str
    verdict: Verdict
    how: str

    def __str__(self) -> str:
        release = f" {self.since}" if self.since else ""
        return f"{self.name}{release}, {self.hardware}: {self.verdict} ({self.how})"

    def as_dict(self) -> dict[str, str]:
        """As plain data, for JSON."""
        return {
            "name": self.name,
            "since": self.since,
            "hardware": self.hardware,
            "verdict": self.verdict.value,
            "how": self.how,
        }


def readers(schemes: Iterable[Scheme], entry: Entry = _PLAIN, dtype: torch.dtype = torch.bfloat16) -> list[Reader]:
    """Who reads a checkpoint.

    Args:
        schemes: those of its linears; of several, a reader does what it does with the worst of them.
        entry: what the model does while it runs that only sliderquant knows of.
        dtype: of the model, which config.json names.

    Returns:
        sliderquant on a GPU and on a CPU, vLLM on a GPU and on a CPU, transformers: always these five, in this order.
    """
    different = list(dict.fromkeys(schemes))
    if not different:
        raise InputError("schemes: expected one or more, found none")
    return _readers(different, _what_others_lack(entry), dtype)


def _readers(schemes: list[Scheme], lacking: str, dtype: torch.dtype = torch.bfloat16) -> list[Reader]:
    on_gpu, on_cpu = (_worst([judge(scheme, lacking) for scheme in schemes]) for judge in (_vllm_gpu, _vllm_cpu))
    rounds = any(scheme.quantizes_activations for scheme in schemes)
    return [
        Reader("sliderquant", "", "NVIDIA GPU", Verdict.RUNS, _triton(rounds)),
        Reader("sliderquant", "", "CPU", *_cpu(schemes, dtype)),
        Reader("vLLM", VLLM_VERSION, "NVIDIA GPU", *on_gpu),
        Reader("vLLM", VLLM_VERSION, "CPU", *on_cpu),
        Reader("transformers", TRANSFORMERS_VERSION, "GPU or CPU", *_transformers(schemes, lacking)),
    ]


def _worst(judged: list[_Judged]) -> _Judged:
    verdict = max((verdict for verdict, _ in judged), key=_ORDER.index)
    # Of those it runs, each may need something of its own.
    return verdict, "; ".join(dict.fromkeys(how for found, how in judged if found == verdict))


def _triton(rounds: bool) -> str:
    return "Triton kernels, on packed weights" + ("; products of integers" if rounds else "")


def _cpu(schemes: list[Scheme], dtype: torch.dtype) -> _Judged:
    if any(scheme.quantizes_activations for scheme in schemes):
        return Verdict.RUNS, "products of integers"
    if dtype == torch.float32:
        return Verdict.DENSE, 'the model is in float32; load(..., dtype="bfloat16") runs it on packed weights'
    slow = any(scheme.bits == 8 and (scheme.group_size is not None or not scheme.symmetric) for scheme in schemes)
    others = "elsewhere weights dequantized on every call" if slow else "elsewhere PyTorch's integer matmul"
    return Verdict.RUNS, f"packed weights, with AVX512-VNNI; {others}"


def _vllm_gpu(scheme: Scheme, lacking: str) -> _Judged:
    if lacking:
        return Verdict.REFUSES, _UNKNOWN.format(lacking)
    if scheme.stored_format == INT8:
        return Verdict.RUNS, "CUTLASS int8, compute capability 7.5 to 9.0"
    if scheme.quantizes_activations and not scheme.activation_symmetric:
        return Verdict.REFUSES, _ASYMMETRIC_ACTIVATIONS
    kernel, needs = _gpu_kernel(scheme)
    if not scheme.quantizes_activations or kernel == "Humming":
        return Verdict.RUNS, f"{kernel}, {needs}"
    elsewhere = "; elsewhere Humming, which rounds them" if "Hopper" in needs else ""
    return Verdict.LEAVES_OUT, f"{kernel}{' on Hopper' if elsewhere else ''} does not round them{elsewhere}"


_HUMMING = ("Humming", "compute capability 7.5 or later, with the package humming")


def _gpu_kernel(scheme: Scheme) -> tuple[str, str]:
    """The first of vLLM's weight-only kernels that takes the packed weight, and what that takes."""
    if scheme.bits == 4 or (scheme.bits == 8 and scheme.symmetric):
        return "Marlin or Machete", "compute capability 7.5 or later"
    if scheme.bits == 8 and scheme.group_size != 32:
        return "Machete", "on Hopper; elsewhere Humming, with the package humming"
    return _HUMMING


def _vllm_cpu(scheme: Scheme, lacking: str) -> _Judged:
    if lacking:
        return Verdict.REFUSES, _UNKNOWN.format(lacking)
    if scheme.stored_format == INT8:
        return Verdict.RUNS, "oneDNN int8"
    if scheme.quantizes_activations and not scheme.activation_symmetric:
        return Verdict.REFUSES, _ASYMMETRIC_ACTIVATIONS
    if scheme.bits != 4:
        return Verdict.REFUSES, "its kernels for packed weights take 4 bits only"
    if scheme.quantizes_activations:
        return Verdict.LEAVES_OUT, "its int4 kernel does not round them"
    return Verdict.RUNS, "its int4 kernel; inputs and outputs of every linear in multiples of 32"


_ASYMMETRIC_ACTIVATIONS = "it has no scheme for activations with zero-points and packed weights"


_UNKNOWN = "it does not know quant_method sliderquant ({})"


def _what_others_lack(entry: Entry) -> str:
    """Why others have to keep away from a checkpoint; empty: they need not."""
    online = () if entry.rotations is None else entry.rotations.online
    lacking = [f"{', '.join(online)} while the model runs"] if online else []
    lacking += [f"queries, keys and values of {entry.kv_bits} bits"] if entry.kv_bits < 16 else []
    lacking += ["clipped ranges"] if entry.clipped else []
    return "; ".join(lacking)


def _transformers(schemes: list[Scheme], lacking: str) -> _Judged:
    if lacking:
        return Verdict.MISREADS, "it warns, and takes codes for weights or random ones; " + _UNKNOWN.format(lacking)
    asymmetric = any(not scheme.symmetric for scheme in schemes)
    if asymmetric and len(schemes) > 1:
        return Verdict.REFUSES, "it takes one scheme for all linears when it dequantizes, which zero-points need"
    rounds = any(scheme.quantizes_activations for scheme in schemes)
    if asymmetric and rounds:
        return Verdict.LEAVES_OUT, "with CompressedTensorsConfig(dequantize=True)"
    if asymmetric:
        return Verdict.DENSE, "with CompressedTensorsConfig(dequantize=True)"
    return Verdict.DENSE, "it rounds activations in the model's dtype" if rounds else "as it is"


_ROWS = (
    ("`W4A16`", r"W4A16(-g\d+)?"),
    ("`W4A16-sym`", r"W4A16(-g\d+)?-sym"),
    ("`W8A16-sym`", r"W8A16(-g\d+)?-sym"),
    ("`W8A16`, `W8A16-g64`, `-g128`", r"W8A16(-g64|-g128)?"),
    ("`W8A16-g32`", r"W8A16-g32"),
    ("`W2A16`, `W3A16`", r"W[23]A16(-g\d+)?"),
    ("`W2A16-sym`, `W3A16-sym`", r"W[23]A16(-g\d+)?-sym"),
    ("`W8A8-sym-act-sym`", r"W8A8-sym-act-sym"),
    ("`W4A4-sym-act-sym`, `W4A8-sym-act-sym`", r"W4A[48](-g\d+)?-sym-act-sym"),
    ("`W4A4-act-sym`, `W4A8-act-sym`", r"W4A[48](-g\d+)?-act-sym"),
    ("`W8A8-g64-sym-act-sym`, `W8A4-sym-act-sym`", r"W8A(8-g\d+|4(-g\d+)?)-sym-act-sym"),
    ("`W8A8-act-sym`, `W8A4-act-sym`", r"W8A[48]-act-sym"),
    ("`W2A4-sym-act-sym`, `W2A8-sym-act-sym`", r"W2A[48](-g\d+)?-sym-act-sym"),
    ("`W2A4-act-sym`, `W2A8-act-sym`", r"W2A[48](-g\d+)?-act-sym"),
    ("other `A4`, `A8`, with `-sym`", r"W\dA[48](-g\d+)?-sym"),
    ("other `A4`, `A8`", r"W\dA[48](-g\d+)?"),
)
"""What a row of the table is called, and the schemes that it stands for."""


def every_scheme() -> list[Scheme]:
    """All that a linear can be quantized to."""
    found = []
    for bits in BITS:
        for group_size in (None, *GROUP_SIZES):
            for symmetric in (False, True):
                for activation_bits in ACTIVATION_BITS:
                    for activation_symmetric in (False, True):
                        try:
                            scheme = Scheme(bits, group_size, symmetric, activation_bits, activation_symmetric)
                        except InputError:
                            continue
                        found.append(scheme)
    return found


def row_of(scheme: Scheme) -> str:
    """What the row of the table is called that a scheme is in."""
    (label,) = (label for label, pattern in _ROWS if re.fullmatch(pattern, str(scheme)))
    return label


def readers_table() -> str:
    """The table of the documentation: for every kind of scheme, what vLLM and transformers do. sliderquant runs all."""
    heads = (f"vLLM {VLLM_VERSION}, NVIDIA GPU", f"vLLM {VLLM_VERSION}, CPU", f"transformers {TRANSFORMERS_VERSION}")
    lines = [f"| scheme | {' | '.join(heads)} |", "|---|---|---|---|"]
    shown = {row_of(scheme): readers([scheme])[2:] for scheme in reversed(every_scheme())}
    for label, _ in _ROWS:
        lines.append("| " + " | ".join([label, *(f"{reader.verdict}: {reader.how}" for reader in shown[label])]) + " |")
    own = _readers([Scheme(4)], "see there")[2:]
    cells = [f"{reader.verdict}: {reader.how.replace(' (see there)', '')}" for reader in own]
    lines.append("| " + " | ".join(["with R3 or R4, `KV4`, `KV8`, or clipped ranges", *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(readers_table(), end="")
