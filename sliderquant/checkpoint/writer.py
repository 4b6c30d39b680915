"""Writing a checkpoint folder: streamed, atomic, the same bytes for the same inputs.

Everything goes to a hidden folder, which becomes visible at the end (`staging`). Whatever goes wrong before that,
nothing is left behind and an older checkpoint of the same name is untouched.
"""

import json
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sliderquant.checkpoint.card import CardInfo, render_card
from sliderquant.checkpoint.checksums import write_checksums
from sliderquant.checkpoint.clips import clip_from
from sliderquant.checkpoint.config import Entry, quantization_config, sliderquant_entry
from sliderquant.checkpoint.packing import pack, unpack
from sliderquant.checkpoint.reader import REPORT_NAME, read_checkpoint
from sliderquant.checkpoint.shards import ShardWriter, disk_full, free_bytes
from sliderquant.checkpoint.skeleton import build_skeleton, check_against_model, linear_names, plain_config
from sliderquant.checkpoint.staging import Staging, resolved, sync
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.files import carried_over
from sliderquant.quantizer.grids import QuantizedWeight, dequantize
from sliderquant.rotations.transforms import Rotations
from sliderquant.schemes import Scheme

__all__ = ["CheckpointWriter"]

_ENDING = tuple(
    int(getattr(signal, name))
    for name in ("SIGTERM", "SIGHUP")
    if hasattr(signal, name)  # not on every system
)


class CheckpointWriter:
    """Writes one checkpoint; a context manager.

        with CheckpointWriter(out) as writer:
            for each linear: writer.add_quantized(name, quantized, scheme, trained)
            for each other tensor: writer.add_tensor(name, tensor)
            writer.finish(config, source, report, card)

    Leaving the context without `finish`, by an exception, Ctrl-C, SIGTERM or SIGHUP, removes what was written. At most
    one shard is in memory.
    """

    def __init__(
        self,
        out: str | Path,
        overwrite: bool = False,
        max_shard_bytes: int = 5_000_000_000,
        estimated_bytes: int | None = None,
    ) -> None:
        """Check that the checkpoint can be written, before any work.

        Args:
            out: the folder to make; its parents are made too.
            overwrite: replace a quantized checkpoint (and nothing else) that is there.
            max_shard_bytes: no file gets larger, unless a single tensor is.
            estimated_bytes: what the checkpoint will take, if known.

        Raises:
            InputError: `out` exists, is not replaceable or not writable, or the disk has not `estimated_bytes` free.
        """
        self.out = resolved(out)
        _check_replaceable(self.out, overwrite)
        self._staging = Staging(self.out)
        if max_shard_bytes < 1:
            raise InputError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number of bytes")
        free = free_bytes(self._staging.parent)
        if estimated_bytes is not None and estimated_bytes > free:
            raise InputError(
                f"{self.out}: the checkpoint needs about {estimated_bytes / 1e9:.3g} GB, but only {free / 1e9:.3g} GB "
                "are free; free some space or choose another folder"
            )
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._estimated_bytes = estimated_bytes or 0
        self._schemes: dict[str, Scheme] = {}
        self._code_bits = self._quantized_weights = 0
        self._rotations: Rotations | None = None
        self._kv_bits = 16
        self._clipped = False
        self._folder: Path | None = None
        self._dtype = torch.bfloat16  # of the model; known when it is written
        self._shards: ShardWriter | None = None
        self._digests: dict[str, dict[str, str]] | None = None
        self._handled: list[int] = []

    def __enter__(self) -> "CheckpointWriter":
        self._folder = self._staging.make()
        self._shards = ShardWriter(self._folder, self._max_shard_bytes)
        # A process that is terminated, or whose terminal is closed, would leave the partial folder behind. A handler of
        # the program's own goes first, and so does nohup.
        if threading.current_thread() is threading.main_thread():
            self._handled = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
        for number in self._handled:
            signal.signal(number, _exit_on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        handled, self._handled = self._handled, []
        for number in handled:
            signal.signal(number, signal.SIG_IGN)
        self._staging.remove()
        self._folder = self._shards = None
        for number in handled:
            signal.signal(number, signal.SIG_DFL)

    def add_quantized(self, name: str, quantized: QuantizedWeight, scheme: Scheme, trained: Tensor) -> None:
        """Pack and write the weight of a linear, after checking that what is read back is what was trained.

        Args:
            name: of the linear: `model.layers.0.mlp.down_proj`.
            quantized: codes uint8 `[out, in]`, scale `[out, groups]`, zero_point uint8 `[out, groups]` or None.
            scheme: how it is quantized.
            trained: the dequantized weight, fp32 `[out, in]`.

        Raises:
            CheckpointError: the packed weight is not, bit for bit, the trained one; or the disk is full.
        """
        parts = pack(quantized, scheme)
        stored = dequantize(unpack(parts, scheme), scheme)
        if stored.shape != trained.shape or not torch.equal(stored, trained.to(stored.device, torch.float32)):
            raise CheckpointError(
                f"layer {name}: the packed weight is not the trained one ({_difference(stored, trained)}): the weight "
                f"was not on the grid of {scheme} with scales in {quantized.scale.dtype}"
            )
        largest = stored.abs().amax().item()
        if not largest <= torch.finfo(quantized.scale.dtype).max:
            raise CheckpointError(
                f"layer {name}: quantized to {scheme}, its largest weight is {largest:.3g}, more than "
                f"{quantized.scale.dtype} holds: save the model in bfloat16 or float32 first"
            )
        for part, tensor in parts.items():
            self.add_tensor(f"{name}.{part}", tensor)
        self._schemes[name] = scheme
        self._code_bits += scheme.bits * quantized.codes.numel()
        self._quantized_weights += quantized.codes.numel()

    def add_clip(self, name: str, tensor: Tensor) -> None:
        """Write the clipping of something that is rounded while the model runs. A model with one has one for all that
        it rounds.

        Args:
            name: `{linear}.input_clip`, or `{attention}.query_clip`, `key_clip` and `value_clip`.
            tensor: factors on the lower and the upper end of its range, fp32 `[2]`.

        Raises:
            CheckpointError: the factors are not above 0 and at most 1; or as `add_tensor`.
        """
        clip_from(tensor, name)
        self.add_tensor(name, tensor)
        self._clipped = True

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a tensor as it is: embeddings, norms, biases, the output head.

        Raises:
            CheckpointError: there is a tensor of this name already, or the disk is full.
        """
        if self._shards is None:
            raise RuntimeError("CheckpointWriter is used inside `with`, and not after finish()")
        self._shards.add(name, tensor)

    def finish(
        self,
        config: PretrainedConfig | dict[str, Any],
        source: str | Path,
        report: Mapping[str, Any] | None = None,
        card: CardInfo | None = None,
    ) -> Path:
        """`write_model`, then `publish`: when nothing is to be measured in between."""
        self.write_model(config, source)
        return self.publish(report, card)

    def write_model(
        self,
        config: PretrainedConfig | dict[str, Any],
        source: str | Path,
        rotations: Rotations | None = None,
        kv_bits: int = 16,
    ) -> Path:
        """Write the last shard, the configuration and the tokenizer: what it takes to load the model.

        Args:
            config: of the model; a `quantization_config` in it is replaced.
            source: local folder of the original model, whose tokenizer, chat template, generation configuration and
                licence are carried over.
            rotations: what the weights were rotated by.
            kv_bits: what queries, keys and values are rounded to while the model runs: 4 or 8 bits; 16: not.

        Returns:
            the temporary folder, which can be loaded from, to measure the packed model before it is published.

        Raises:
            CheckpointError: the tensors are not those of the model, or the disk is full.
        """
        if self._folder is None or self._shards is None:
            raise RuntimeError("CheckpointWriter is used inside `with`, and not after publish()")
        if not self._schemes:
            raise CheckpointError(f"{self.out}: no quantized linear was written")
        self._rotations, self._kv_bits = rotations, kv_bits
        with disk_full(self.out, max(self._estimated_bytes, self._shards.total_bytes)):
            self._digests = self._shards.finish()
            _carry_over(Path(source), self._folder)
            _write_json(self._folder / "config.json", self._full_config(config))
            self._dtype = _check_written(self._folder)
        return self._folder

    def publish(
        self, report: Mapping[str, Any] | None = None, card: CardInfo | None = None, page: str | None = None
    ) -> Path:
        """Write the reports, the model card and the checksums, and make the whole visible as `out`.

        Args:
            report: becomes sliderquant-report.json.
            card: what the model card says.
            page: becomes sliderquant-report.html.

        Returns:
            `out`.

        Raises:
            CheckpointError: the disk is full.
        """
        if self._folder is None or self._shards is None or self._digests is None:
            raise RuntimeError("CheckpointWriter.publish comes after write_model")
        folder, total = self._folder, self._shards.total_bytes
        with disk_full(self.out, max(self._estimated_bytes, total)):
            _write_json(folder / REPORT_NAME, dict(report or {}))
            average_bits = self._code_bits / self._quantized_weights if self._quantized_weights else None
            entry = Entry(self._rotations, self._kv_bits, self._clipped)
            text = render_card(
                card or CardInfo(), self._schemes, total, entry, average_bits, self._dtype, _has_template(folder)
            )
            (folder / "README.md").write_text(text, encoding="utf-8")
            if page is not None:
                (folder / "sliderquant-report.html").write_text(page, encoding="utf-8")
            write_checksums(folder, self._digests)
            for path in [*folder.rglob("*"), folder]:
                sync(path)
            _check_replaceable(self.out, self._overwrite)  # hours may have passed
            self._staging.publish()
        self._folder = self._shards = None
        return self.out

    def _full_config(self, config: PretrainedConfig | dict[str, Any]) -> dict[str, Any]:
        full = dict(config) if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=True))
        full.pop("_name_or_path", None)
        model = build_skeleton(plain_config(full, "config"), "config", torch.float32)
        full.setdefault("architectures", None)
        full["architectures"] = full["architectures"] or [type(model).__name__]
        ignore = [name for name in linear_names(model) if name not in self._schemes]
        entry = Entry(self._rotations, self._kv_bits, self._clipped)
        full["quantization_config"] = quantization_config(self._schemes, ignore, entry.own)
        full["sliderquant"] = sliderquant_entry(*entry)
        return full


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not Staging(out).visible()):
        return
    if not overwrite:
        raise InputError(f"{out} exists already; choose another folder, or replace it by --overwrite (overwrite=True)")
    # Replacing removes the whole folder: never one that holds something else, such as the original model.
    if not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder; remove it or choose another folder")
    try:
        quantized = "quantization_config" in json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        quantized = False
    if not quantized:
        raise InputError(
            f"{out} is not a quantized checkpoint and is not overwritten; remove it or choose another folder"
        )


def _has_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template, in a file of its own or in its configuration."""
    if any(folder.glob("chat_template*")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _check_written(folder: Path) -> torch.dtype:
    """Check the headers of what was written; returns the dtype of the model."""
    checkpoint = read_checkpoint(folder)
    where = str(folder)
    check_against_model(checkpoint, build_skeleton(plain_config(checkpoint.config, where), where, torch.float32))
    return checkpoint.dtype


def _carry_over(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise InputError(f"source {source}: expected the local folder of the original model")
    for path in carried_over(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)  # what a link leads to, with the mode of a new file


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _difference(stored: Tensor, trained: Tensor) -> str:
    if stored.shape != trained.shape:
        return f"shapes {list(stored.shape)} and {list(trained.shape)}"
    off = stored != trained.to(stored.device, torch.float32)
    worst = (stored - trained.to(stored.device, torch.float32)).abs().max().item()
    return f"{int(off.sum())} of {off.numel()} weights differ, by up to {worst:.3g}"


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
