"""Rotations: orthogonal changes of basis that spread outliers over many channels and leave a model's function as it is.

A rotation takes a row x to `(x * signs) R^T`: random signs, then the orthonormal Hadamard transform of its size. Four
places of a decoder have one, by the names of SpinQuant (arXiv 2405.16406):

    R1  the residual stream, hidden size      folded into embedding, head, and all that reads the stream or adds to it
    R2  the values of each KV head, head_dim  folded into v_proj and into o_proj
    R3  queries and keys of each head         online, after RoPE; of use where they are quantized
    R4  the input of down_proj                online; its inverse is folded into down_proj

For `y = x W^T + b` with rows x and y, a rotation `x Q` of the input makes `W Q` of the weight, one of the output makes
`Q^T W` and `b Q`: rows of W, or of W^T, are rotated as activations are. R1 commutes with an RMSNorm only if that has no
weight, so the weights of norms are folded into the linears that read them first; a head that is tied to the embedding
becomes a tensor of its own.

What was rotated is `Rotations`: plain data, from which every sign and matrix can be made again.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.source import ModelSource
from sliderquant.schemes import Scheme
from sliderquant_kernels import HadamardTransform, factor_hadamard, hadamard

__all__ = [
    "ROTATIONS",
    "RotatedSource",
    "Rotation",
    "Rotations",
    "fold_linear",
    "random_signs",
    "rotate",
    "rotated",
]

ROTATIONS: Mapping[str, str] = {
    "R1": "the residual stream",
    "R2": "the values of each KV head",
    "R3": "queries and keys after RoPE",
    "R4": "the input of down_proj",
}
_ONLINE = ("R3", "R4")
_ROWS = 8192


def random_signs(seed: int, label: str, size: int) -> Tensor:
    """+1 and -1, fp32 `[size]`, from SHAKE-256 of `"{seed}/{label}"`: the same with every version of every library, so
    that a checkpoint need not hold them."""
    stream = bytearray(hashlib.shake_256(f"{seed}/{label}".encode()).digest(-(-size // 8)))
    bits = torch.frombuffer(stream, dtype=torch.uint8)[:, None] >> torch.arange(8) & 1
    return 1 - 2 * bits.flatten()[:size].float()


@dataclass(frozen=True)
class Rotation:
    """`x -> (x * signs) R^T` on each head of a row.

    Attributes:
        signs: fp32 `[heads, size]`, the heads lying next to each other in a row; one head: the whole row.
        transform: the Hadamard transform of `size`.
    """

    signs: Tensor
    transform: HadamardTransform

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., heads * size]` -> the same shape and dtype."""
        return rotate(x, self.signs, self.transform)

    def repeated(self, times: int) -> "Rotation":
        """Each head `times` times in a row: what the query heads of grouped-query attention see of a KV head."""
        return Rotation(self.signs.repeat_interleave(times, 0), self.transform)


def rotate(x: Tensor, signs: Tensor, transform: HadamardTransform) -> Tensor:
    """`(x * signs) R^T` on each head.

    Args:
        x: `[..., heads * size]`, float.
        signs: `[heads, size]`.
        transform: of `size`.

    Raises:
        InputError: the shapes do not fit.
    """
    if signs.shape[-1] != transform.n or x.shape[-1] != signs.numel():
        raise InputError(
            f"x of {x.shape[-1]} channels, signs {list(signs.shape)}: expected signs [heads, {transform.n}] and "
            "heads times as many channels"
        )
    heads = x.unflatten(-1, tuple(signs.shape)) * signs.to(x.device, x.dtype)
    return hadamard(heads, transform).flatten(-2)


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
class Rotations:
    """Which rotations a model has.

    Attributes:
        seed: of the random signs.
        transforms: by name, `"R1"` to `"R4"`, the Hadamard transform; a name that is not there is not rotated.
    """

    seed: int
    transforms: Mapping[str, HadamardTransform]

    @classmethod
    def of_model(cls, source: ModelSource, names: Sequence[str] = ("R1", "R2", "R4"), seed: int = 0) -> "Rotations":
        """The rotations `names` for the sizes of a model.

        Raises:
            InputError: a name is not one of R1 to R4, or a size is odd.
        """
        unknown = [name for name in names if name not in ROTATIONS]
        if unknown:
            raise InputError(f"rotations {', '.join(unknown)}: expected some of {', '.join(ROTATIONS)}")
        sizes = _sizes(source.config)
        odd = [f"{ROTATIONS[name]} has {sizes[name]} channels" for name in names if sizes[name] % 2]
        if odd:
            raise InputError(f"rotations: {', '.join(odd)}, and only even numbers of channels can be rotated")
        return cls(seed, {name: factor_hadamard(sizes[name]) for name in ROTATIONS if name in names})

    @property
    def online(self) -> tuple[str, ...]:
        """Those that a model has to compute when it runs; without them the checkpoint computes something else."""
        return tuple(name for name in _ONLINE if name in self.transforms)

    def hidden(self) -> Rotation | None:
        """R1."""
        return self._rotation("R1", "hidden")

    def value(self, layer: int, heads: int) -> Rotation | None:
        """R2 of a layer: each of its KV heads has signs of its own."""
        return self._rotation("R2", f"layers.{layer}.value", heads)

    def query_key(self, layer: int) -> Rotation | None:
        """R3 of a layer, the same for every head of q and of k."""
        return self._rotation("R3", f"layers.{layer}.query_key")

    def down(self, layer: int) -> Rotation | None:
        """R4 of a layer."""
        return self._rotation("R4", f"layers.{layer}.down")

    def _rotation(self, name: str, label: str, heads: int = 1) -> Rotation | None:
        transform = self.transforms.get(name)
        if transform is None:
            return None
        return Rotation(random_signs(self.seed, label, heads * transform.n).view(heads, -1), transform)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json: `{"seed": 0, "R1": {...}, ...}`."""
        return {"seed": self.seed, **{name: transform.metadata() for name, transform in self.transforms.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rotations":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: it is not what `to_dict` makes.
        """
        expected = f"expected seed and some of {', '.join(ROTATIONS)}"
        unknown = sorted(data.keys() - ROTATIONS.keys() - {"seed"})
        if unknown:
            raise CheckpointError(f"rotations: unknown {', '.join(unknown)}; {expected}")
        if not isinstance(data.get("seed"), int):
            raise CheckpointError(f"rotations: seed is {data.get('seed')!r}; {expected}")
        transforms = {}
        for name in ROTATIONS:
            if name in data:
                try:
                    transforms[name] = HadamardTransform.from_metadata(data[name])
                except (ValueError, TypeError, KeyError) as error:
                    raise CheckpointError(f"rotations: {name} is not a Hadamard transform: {error}") from error
        return cls(data["seed"], transforms)

    def check_sizes(self, config: Any) -> None:
        """Raises CheckpointError when a transform is not of the size that the model has."""
        sizes = _sizes(config)
        for name, transform in self.transforms.items():
            if transform.n != sizes[name]:
                raise CheckpointError(
                    f"rotations: {name} is of size {transform.n}, but {ROTATIONS[name]} has {sizes[name]} channels"
                )


def _sizes(config: Any) -> dict[str, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"R1": config.hidden_size, "R2": head_dim, "R3": head_dim, "R4": config.intermediate_size}


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
        rotations.check_sizes(original.config)
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
        return frozenset(f"{name}.weight" for layer in range(self.num_layers) for name in self.linear_names(layer))

    @cached_property
    def _norms(self) -> frozenset[str]:
        family = self.family
        inner = (f"{family.layers}.{layer}.{norm}" for layer in range(self.num_layers) for norm in family.norms)
        return frozenset([*inner, family.final_norm])

    @cached_property
    def _folds(self) -> dict[str, _Fold]:
        """By full name of the module."""
        family, config, hidden = self.family, self.config, self.rotations.hidden()
        # The rows of an embedding are vectors of the residual stream: they are rotated as the rows of a weight are.
        folds = {
            family.embedding: _Fold(inputs=hidden),
            family.head: _Fold(norm=family.final_norm, inputs=hidden),
        }
        for layer in range(self.num_layers):
            prefix = f"{family.layers}.{layer}."
            value = self.rotations.value(layer, config.num_key_value_heads)
            queries_per_value = config.num_attention_heads // config.num_key_value_heads
            for norm, linears in zip(family.norms, family.shared_inputs, strict=True):
                for linear in linears:
                    outputs = value if linear == family.value else None
                    folds[prefix + linear] = _Fold(prefix + norm, hidden, outputs)
            attended = None if value is None else value.repeated(queries_per_value)
            folds[prefix + family.output] = _Fold(inputs=attended, outputs=hidden)
            folds[prefix + family.down] = _Fold(inputs=self.rotations.down(layer), outputs=hidden)
        return folds


def rotated(source: ModelSource, names: Sequence[str], seed: int, scheme: Scheme) -> ModelSource:
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
