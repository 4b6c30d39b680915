"""Speed and memory of one model in a process of its own: `python -m sliderquant.evaluation.bench_worker`.

The first line of standard input is a `Job` as JSON. Each line after it asks for one measurement, `["load"]`,
`["first_token", 512]`, `["decode", 8]` or `["facts"]`, and is answered by a line of JSON on standard output.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from sliderquant.devices import resolve_device
from sliderquant.evaluation.models import is_quantized
from sliderquant.loading import load
from sliderquant.models.source import open_model
from sliderquant.warming import warm_up

__all__ = ["Job", "Worker", "generate_timed", "weight_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        model: folder of a checkpoint or of an original model.
        device: as `resolve_device` takes it.
        dtype: as `sliderquant.load` takes it; `"auto"` is what a user gets who says nothing.
        decode_prompt: tokens of each prompt before decoding.
        new_tokens: tokens to decode.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    decode_prompt: int = 16
    new_tokens: int = 32


class Worker:
    """A model that is loaded and run as a user does."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = resolve_device(job.device)
        self.model: Any = None
        self.quantized = is_quantized(Path(job.model))
        self.config = None if self.quantized else open_model(job.model).config
        self.memory = {"before": _resident()}

    def load(self) -> float:
        """Seconds of loading; libraries are imported already."""
        _reset_peak(self.device)
        start = time.perf_counter()
        if self.quantized:
            self.model = load(self.job.model, device=self.device, dtype=self.job.dtype)
        else:
            # With the configuration as it was checked: the file may name code on the hub, which is not to run.
            self.model = AutoModelForCausalLM.from_pretrained(
                self.job.model,
                config=self.config,
                dtype=self.job.dtype,
                device_map={"": self.device},
                trust_remote_code=False,
            ).eval()
        _wait(self.device)
        seconds = time.perf_counter() - start
        self._note_peak("load")
        if self.quantized:
            warm_up(self.model)
        _reset_peak(self.device)
        return seconds

    def first_token(self, length: int) -> float | None:
        """Seconds from the call of `generate` to the first token after a prompt of `length` tokens, batch 1.

        None: the model does not take so many.
        """
        if length >= int(self.model.config.max_position_embeddings):
            return None
        start, times = generate_timed(self.model, 1, length, 1)
        return times[0] - start

    def decode(self, batch: int) -> float:
        """Tokens a second of all sequences together, from the first new token to the last."""
        _, times = generate_timed(self.model, batch, self.job.decode_prompt, self.job.new_tokens)
        return batch * (len(times) - 1) / (times[-1] - times[0])

    def facts(self) -> dict[str, Any]:
        """Bytes of the weights, dtype, threads, and `memory`: bytes of the process `before` loading, and its peaks
        while `load`ing and while `run`ning, on CUDA also those of the device."""
        self._note_peak("run")
        return {
            "weight_bytes": weight_bytes(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "memory": self.memory,
        }

    def _note_peak(self, phase: str) -> None:
        self.memory[phase] = _peak()
        if self.device.type == "cuda":
            self.memory[f"device_{phase}"] = torch.cuda.max_memory_allocated(self.device)


def generate_timed(model: Any, batch: int, length: int, new_tokens: int) -> tuple[float, Sequence[float]]:
    """When `generate` was called and when each token was there, in seconds of time.perf_counter, for random prompts of
    `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    clock = _Clock(model.device)
    _wait(model.device)
    start = time.perf_counter()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return start, clock.times


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all storages of a model's parameters and buffers; what several share counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in model.modules()
        for tensor in [*module._parameters.values(), *module._buffers.values()]
        if tensor is not None
    }
    return sum(storages.values())


class _Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        _wait(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> int:
    return _status("VmRSS") or _peak()


def _peak() -> int:
    """Bytes of the largest resident memory of this process since `_reset_peak`, or, where that cannot be, ever."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _status(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _reset_peak(device: torch.device) -> None:
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
        _CLEAR_REFS.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def main() -> None:
    worker = Worker(Job(**json.loads(sys.stdin.readline())))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
