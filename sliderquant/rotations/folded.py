"""Rotations folded into a model's weights: a `ModelSource` whose tensors are those of the rotated model.

For `y = x W^T + b` with rows x and y, a rotation `x Q` of the input makes `W Q` of the weight, one of the output makes
`Q^T W` and `b Q`: rows of W, or of W^T, are rotated as activations are. R1 commutes with an RMSNorm only if that has no
weight, so the weights of norms are folded into the linears that read them first; a head that is tied to the embedding
becomes a tensor of its own.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sliderquant.errors import InputError
from sliderquant.models.source import ModelSource
from sliderquant.rotations.transforms import Rotation, Rotations
from sliderquant.schemes import ModelScheme

__all__ = ["RotatedSource", "fold_linear", "rotated"]

_ROWS = 8192


@torch.no_grad()
def fold_linear(
    weight: Tensor, norm: Tensor | None = None, inputs: Rotation | None = None, outputs: Rotation | None = None
) -> Tensor:
    """The weight of a linear whose input is not multiplied by the norm's weight any more, and rotated, and whose output
    is to come out rotated. A bias is rotated with the outputs: `outputs(bias)`.

    Args:
        weight: `[out, in]`, fp32.
        norm: weight of the RMSNorm before it, `[in]`.
        inputs, outputs: of the size of a row, and of a column.
    """
    if norm is not None:
        weight = weight * norm
    if inputs is not None:
        # Rows at a time: of an embedding, the copies that a transform makes would not fit.
        rotated = torch.empty_like(weight)
        for rows, into in zip(weight.split(_ROWS), rotated.split(_ROWS), strict=True):
            into.copy_(inputs(rows))
        weight = rotated
    if outputs is not None:
        weight = outputs(weight.T).T.contiguous()
    return weight


@dataclass(frozen=True)
class _Fold:
    """What happens to one module's tensors: see `fold_linear`; `norm` is the full name of the norm before it."""

    norm: str | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None


@dataclass(frozen=True)
class RotatedSource(ModelSource):
    """A model with its norms folded and its rotations folded in, seen one tensor at a time.

    Reads as a `ModelSource` of another model that computes the same, up to rounding, once the online rotations are in
    place (`rotations.online`): its norms have weights of 1 and its head is not tied.

    The weights that will be quantized come in fp32, unrounded. All else, which is stored as it is, is rounded to the
    dtype of the model first, so that what is calibrated on is what is stored.
    """

    original: ModelSource
    rotations: Rotations

    @classmethod
    def of(cls, original: ModelSource, rotations: Rotations) -> "RotatedSource":
        """Raises CheckpointError when the rotations are not of the model's sizes."""
        rotations.check_sizes(original.layers)
        config = copy.deepcopy(original.config)
        config.tie_word_embeddings = False
        family = original.family
        stored_head = family.embedding if original.config.tie_word_embeddings else family.head
        tensors = {**original.tensors, f"{family.head}.weight": original.tensors[f"{stored_head}.weight"]}
        return cls(original.name, original.folder, config, family, tensors, original, rotations)

    @property
    def stored_config(self) -> dict[str, Any]:
        return {**self.original.stored_config, "tie_word_embeddings": False}

    def with_seed(self, seed: int) -> "RotatedSource":
        """The same model with the same rotations, their signs from another seed."""
        return RotatedSource.of(self.original, replace(self.rotations, seed=seed))

    @property
    def dtype(self) -> torch.dtype:
        return self.original.dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor in the dtype in which it was stored.

        Raises:
            InputError: as for a ModelSource; or its values do not fit the dtype any more.
        """
        folded = self._folded(name, torch.device("cpu"))
        if folded is None:
            return self.original.tensor(self._stored(name))
        return self._rounded(name, folded)

    def check_values(self) -> None:
        self.original.check_values()

    def weight(self, name: str, device: torch.device) -> Tensor:
        folded = self._folded(name, device)
        if folded is None:
            return self.original.weight(self._stored(name), device)
        return folded if name in self._quantized else self._rounded(name, folded).float()

    def _rounded(self, name: str, folded: Tensor) -> Tensor:
        rounded = folded.to(self.original.tensor(self._stored(name)).dtype)
        if not rounded.isfinite().all():
            raise InputError(
                f"{self.name}: tensor {name}, with norm and rotations folded in, overflows {rounded.dtype}"
            )
        return rounded

    def _folded(self, name: str, device: torch.device) -> Tensor | None:
        """The tensor with everything folded in, fp32 on `device`; None: it stays as it is."""
        module, _, part = name.rpartition(".")
        if module in self._norms and part == "weight":
            return torch.ones(self.shapes[name][0], device=device)
        fold = self._folds.get(module)
        if fold is None:
            return None
        if part == "weight":
            norm = None if fold.norm is None else self.original.weight(f"{fold.norm}.weight", device)
            return fold_linear(self.original.weight(self._stored(name), device), norm, fold.inputs, fold.outputs)
        if part == "bias" and fold.outputs is not None:
            return fold.outputs(self.original.weight(name, device))
        return None

    def _stored(self, name: str) -> str:
        return self._stored_head if name == f"{self.family.head}.weight" else name

    @property
    def _stored_head(self) -> str:
        tied = self.original.config.tie_word_embeddings
        return f"{self.family.embedding if tied else self.family.head}.weight"

    @cached_property
    def _quantized(self) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in self.linear_names)

    @cached_property
    def _norms(self) -> frozenset[str]:
        inner = (layer.full(norm) for layer in self.layers for norm, _ in layer.normed_groups)
        return frozenset([*inner, self.family.final_norm])

    @cached_property
    def _folds(self) -> dict[str, _Fold]:
        """By full name of the module."""
        family, hidden = self.family, self.rotations.hidden()
        # The rows of an embedding are vectors of the residual stream: they are rotated as the rows of a weight are.
        folds = {
            family.embedding: _Fold(inputs=hidden),
            family.head: _Fold(norm=family.final_norm, inputs=hidden),
        }
        for layer in self.layers:
            attention = layer.attention
            value = self.rotations.value(layer.index, attention.kv_heads)
            for group in layer.groups:
                if group.norm is None:
                    continue
                for linear in (*group.linears, *group.kept):
                    outputs = value if linear == attention.value else None
                    folds[layer.full(linear)] = _Fold(layer.full(group.norm), hidden, outputs)
            attended = None if value is None else value.repeated(attention.heads // attention.kv_heads)
            folds[layer.full(attention.output)] = _Fold(inputs=attended, outputs=hidden)
            for mlp in layer.mlps:
                folds[layer.full(mlp.down)] = _Fold(inputs=self.rotations.down(layer.index), outputs=hidden)
        return folds


def rotated(source: ModelSource, names: Sequence[str], seed: int, scheme: ModelScheme) -> ModelSource:
    """The model with the rotations `names` for a scheme folded in; as it is where there are none.

    Raises:
        InputError: R3, and the scheme does not quantize queries and keys; as `Rotations.of_model`.
    """
    if not names:
        return source
    if "R3" in names and not scheme.quantizes_attention:
        raise InputError(
            f"rotate R3: of use only where queries and keys are quantized, which {scheme} does not: leave it out, or "
            "add KV4 or KV8 to the scheme (W4A4KV4)"
        )
    return RotatedSource.of(source, Rotations.of_model(source, names, seed))
