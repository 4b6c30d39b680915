"""Seconds per GB of loading a quantized checkpoint: reading, unpacking, packing for the kernels, merging.

The checkpoint has random weights in the layer shapes of a known model and is written once, to a temporary folder or to
`--folder`. In every round, plain reading of the same files into memory and `sliderquant.load` take turns, so that a
change of the machine's speed hits both. The files are read once before: they come from the page cache, and what is
measured is the processor, not the disk. GB are 10^9 bytes of the checkpoint's files.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig

import sliderquant
from benchmarks import results
from sliderquant.checkpoint import CheckpointWriter, read_checkpoint
from sliderquant.checkpoint.packing import PARTS, unpack
from sliderquant.checkpoint.reader import Checkpoint
from sliderquant.checkpoint.skeleton import build_skeleton
from sliderquant.quantizer.grids import QuantizedWeight, dequantize
from sliderquant.schemes import Scheme
from sliderquant_kernels import choose_layout

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--scheme", default="W4A16-g128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder to write the checkpoint to, or to find it in, and to keep")
    parser.add_argument("--out", type=Path, help="folder for the result files")


def run(arguments: argparse.Namespace) -> None:
    scheme = Scheme.parse(arguments.scheme)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="sliderquant-load-"))
    try:
        path = folder / f"{arguments.shape}-{scheme}-{arguments.layers}-layers"
        if not path.exists():
            write_checkpoint(path, arguments.shape, scheme, arguments.layers)
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        rows = [row for device in devices for row in measure(path, device, arguments.rounds)]
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    shared = {"shape": arguments.shape, "scheme": str(scheme), "layers": arguments.layers}
    written = results.write(f"load-{arguments.shape}-{scheme}", [shared | row for row in rows], arguments.out)
    print(results.markdown(rows, ["device", "what", "gb", "seconds", "seconds_per_gb", "times_plain_reading"]))
    print(f"written to {written}")


def write_checkpoint(path: Path, shape: str, scheme: Scheme, layers: int) -> None:
    """A bf16 Llama with random codes; the vocabulary is small, so that the layers are nearly all of it."""
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, vocab_size=256, dtype="bfloat16")
    model = build_skeleton(config, str(path), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(path) as writer:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                quantized = random_weight(module.out_features, module.in_features, scheme, generator)
                writer.add_quantized(name, quantized, scheme, dequantize(quantized, scheme))
            else:
                for key, parameter in module.named_parameters(recurse=False):
                    writer.add_tensor(f"{name}.{key}", torch.ones(parameter.shape, dtype=torch.bfloat16))
        writer.finish(config, path.parent)


def random_weight(outputs: int, inputs: int, scheme: Scheme, generator: torch.Generator) -> QuantizedWeight:
    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, scheme.levels + 1, shape, generator=generator, dtype=torch.uint8)

    groups = scheme.groups(inputs)
    scale = (0.01 + 0.02 * torch.rand(outputs, groups, generator=generator)).bfloat16()
    return QuantizedWeight(codes(outputs, inputs), scale, None if scheme.symmetric else codes(outputs, groups))


def measure(path: Path, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of seconds per GB: plain reading, loading merged and unmerged, and the two steps that loading adds."""
    checkpoint = read_checkpoint(path)
    size = sum(file.stat().st_size for file in checkpoint.files)
    loads = {
        "plain reading": lambda: read_plainly(checkpoint, device),
        "load": lambda: sliderquant.load(path, device),
        "load, merge=False": lambda: sliderquant.load(path, device, merge=False),
    }
    times: dict[str, list[float]] = {}
    for run_number in range(rounds + 1):
        found = {what: seconds(load, device) for what, load in loads.items()} | seconds_of_steps(checkpoint, device)
        if run_number > 0:  # the first one fills the page cache
            for what, value in found.items():
                times.setdefault(what, []).append(value)
    medians = {what: statistics.median(values) for what, values in times.items()}
    return [
        {
            "device": device,
            "what": what,
            "gb": size / 1e9,
            "seconds": medians[what],
            "seconds_per_gb": medians[what] / (size / 1e9),
            "seconds_quartiles": statistics.quantiles(values, n=4) if len(values) > 1 else values,
            "times_plain_reading": medians[what] / medians["plain reading"],
        }
        for what, values in times.items()
    ]


def read_plainly(checkpoint: Checkpoint, device: str) -> list[torch.Tensor]:
    """Every tensor of the files, copied to memory of its own."""
    tensors = []
    for path in checkpoint.files:
        with safe_open(path, framework="pt") as file:
            tensors += [file.get_tensor(key).to(device, copy=True) for key in file.keys()]  # noqa: SIM118
    return tensors


def seconds_of_steps(checkpoint: Checkpoint, device: str) -> dict[str, float]:
    """Seconds of unpacking the stored codes of all linears, and of packing them for the kernels one by one."""
    spent = {"unpack the stored codes": 0.0, "pack for the kernels": 0.0}
    for name, scheme in checkpoint.schemes.items():
        parts = {}
        for part in PARTS:
            if (stored := checkpoint.tensors.get(f"{name}.{part}")) is not None:
                with safe_open(stored.file, framework="pt") as file:
                    parts[part] = file.get_tensor(f"{name}.{part}").to(device, copy=True)
        found: list[QuantizedWeight] = []
        spent["unpack the stored codes"] += seconds(lambda: found.append(unpack(parts, scheme)), device)  # noqa: B023
        codes, scale, zero_point = found[0]
        layout = choose_layout(
            scheme.bits, *codes.shape, scheme.group_size, scheme.symmetric, codes.device, torch.bfloat16
        )
        spent["pack for the kernels"] += seconds(lambda: layout.pack(codes, scale, zero_point), device)  # noqa: B023
    return spent


def seconds(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
