"""Rotations: orthogonal changes of basis that spread outliers over many channels and leave a model's function as it is.

A rotation takes a row x to `(x * signs) R^T`: random signs, then the orthonormal Hadamard transform of its size. Four
places of a decoder have one, by the names of SpinQuant (arXiv 2405.16406):

    R1  the residual stream, hidden size      folded into embedding, head, and all that reads the stream or adds to it
    R2  the values of each KV head, head_dim  folded into v_proj and into o_proj
    R3  queries and keys of each head         online, after RoPE; of use where they are quantized
    R4  the input of down_proj                online; its inverse is folded into down_proj

What was rotated is `Rotations`: plain data, from which every sign and matrix can be made again. `folded`
puts them into weights.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sliderquant.errors import CheckpointError, InputError
from sliderquant.models.layer import LayerSpec
from sliderquant.models.source import ModelSource
from sliderquant_kernels import HadamardTransform, factor_hadamard, hadamard

__all__ = ["ROTATIONS", "Rotation", "Rotations", "random_signs", "rotate"]

ROTATIONS: Mapping[str, str] = {
    "R1": "the residual stream",
    "R2": "the values of each KV head",
    "R3": "queries and keys after RoPE",
    "R4": "the input of down_proj",
}
_ONLINE = ("R3", "R4")


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
        sizes = _sizes(source.layers, names)
        if "R2" in names and any(layer.attention.value is None for layer in source.layers):
            raise InputError("rotations: values have no linear of their own in this model: leave R2 out")
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

    def check_sizes(self, layers: Sequence[LayerSpec]) -> None:
        """Raises CheckpointError when a transform is not of the size that the model's layers have, and InputError when
        these have several."""
        sizes = _sizes(layers, self.transforms)
        for name, transform in self.transforms.items():
            if transform.n != sizes[name]:
                raise CheckpointError(
                    f"rotations: {name} is of size {transform.n}, but {ROTATIONS[name]} has {sizes[name]} channels"
                )


def _sizes(layers: Sequence[LayerSpec], names: Iterable[str]) -> dict[str, int]:
    """Channels that each of these rotations mixes. Raises InputError when it is not the same number in every layer."""
    head_dims = {layer.attention.head_dim for layer in layers}
    found = {
        "R1": {layer.hidden_size for layer in layers},
        "R2": head_dims,
        "R3": head_dims,
        "R4": {mlp.size for layer in layers for mlp in layer.mlps},
    }
    for name in names:
        if len(found[name]) > 1:
            several = " or ".join(map(str, sorted(found[name])))
            raise InputError(
                f"rotations: {ROTATIONS[name]} has {several} channels, expected one size: leave {name} out"
            )
    return {name: min(found[name]) for name in names}
