"""The activation streams: hidden states of every calibration sample, in memory or, past a limit, in a file."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["ActivationStream"]


class ActivationStream:
    """Hidden states `[samples, seqlen, hidden]` fp32, overwritten in place as they walk through the layers.

    Past `memory_limit` bytes the buffer is a memory-mapped file in the temporary folder, deleted with the stream.
    """

    def __init__(self, samples: int, seqlen: int, hidden: int, memory_limit: float) -> None:
        numel = samples * seqlen * hidden
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if numel * 4 > memory_limit:
            self._folder = tempfile.TemporaryDirectory(prefix="sliderquant-stream-")
            path = Path(self._folder.name) / "activations"
            flat = torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)
        else:
            flat = torch.empty(numel, dtype=torch.float32)
        self.data = flat.view(samples, seqlen, hidden)

    @property
    def in_file(self) -> bool:
        return self._folder is not None

    def like(self) -> "ActivationStream":
        """A second stream of the same shape and kind, with nothing in it."""
        samples, seqlen, hidden = self.data.shape
        return ActivationStream(samples, seqlen, hidden, memory_limit=0 if self.in_file else float("inf"))

    def fill(self, samples: Iterable[Tensor]) -> None:
        """Take in the samples `[1, seqlen, hidden]` one after the other."""
        for row, sample in zip(self.data, samples, strict=True):
            row.copy_(sample[0])

    def batch(self, rows: Tensor | slice, device: torch.device) -> Tensor:
        """The samples `rows` as `[batch, seqlen, hidden]` on `device`."""
        return self.data[rows].to(device)

    @torch.no_grad()
    def walk(
        self,
        step: Callable[[Tensor], Tensor],
        device: torch.device,
        batch_size: int,
        into: "ActivationStream | None" = None,
    ) -> None:
        """Replace every batch by `step(batch)`, or write the results to the stream `into` and keep these."""
        target = self if into is None else into
        for start in range(0, self.data.shape[0], batch_size):
            rows = slice(start, start + batch_size)
            target.data[rows].copy_(step(self.batch(rows, device)))

    def close(self) -> None:
        """Free the buffer and its file."""
        del self.data
        if self._folder is not None:
            self._folder.cleanup()
