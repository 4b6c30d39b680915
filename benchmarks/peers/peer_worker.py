"""What the workers of peers share. A worker runs in the peer's environment: it must import nothing of this project.

`PYTHON worker.py TASK.json` reads a task and writes its answer. The task: `model`, folder of the model; `calibration`,
a safetensors file with `input_ids`, int64 `[samples, seqlen]`; `bits`; `group_size`, -1: one group per output channel;
`seed`; `threads`; `options`, arguments that differ from the package's defaults; `output`, a folder that does not exist
yet. Weights have zero-points. The worker writes the model to `output`, dequantized, with `save_pretrained`, and next to
it `<output>.json`: `seconds` of quantizing, with reading the model and without importing the package or writing; and
the `settings` that were used.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

__all__ = ["Quantized", "Task", "main"]


@dataclass(frozen=True)
class Task:
    """What is to be done, as the module's docstring says."""

    model: str
    calibration: str
    bits: int
    group_size: int
    seed: int
    threads: int
    options: dict[str, Any]
    output: str


class Quantized(NamedTuple):
    """A model of transformers with dequantized weights, and the peer's settings, which JSON can hold."""

    model: Any
    settings: dict[str, Any]


def main(quantize: Callable[[Task, torch.Tensor], Quantized]) -> None:
    """Do the task that the command line names."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(task.threads)
    torch.manual_seed(task.seed)
    tokens = load_file(task.calibration)["input_ids"]
    start = time.perf_counter()
    quantized = quantize(task, tokens)
    seconds = time.perf_counter() - start
    quantized.model.save_pretrained(task.output)
    answer = {"seconds": seconds, "settings": quantized.settings}
    Path(f"{task.output}.json").write_text(json.dumps(answer), encoding="utf-8")
