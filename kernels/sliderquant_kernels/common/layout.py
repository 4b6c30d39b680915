"""What the layouts of packed weights have in common: their tensors, their fields, and what they refuse."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedWeight(NamedTuple):
    """The tensors of one packed weight; their shapes and dtypes are in `WeightLayout.specs`."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None


class TensorSpec(NamedTuple):
    """Shape and dtype of a packed tensor; dtype None means the activations' dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class PackedLayout:
    """What all layouts are: a kind of some version for codes of a weight `[n, k]`. See `WeightLayout`."""

    kind: str
    bits: int
    n: int
    k: int
    group_size: int | None
    symmetric: bool
    version: int = 0

    versions: ClassVar[dict[str, int]]
    rounds_activations: ClassVar[bool] = False
    """Whether what the weight is multiplied with is rounded to integers first."""

    @property
    def code_offset(self) -> int:
        """What the loops for CPUs subtract from codes and zero-points."""
        raise NotImplementedError

    def _check_kind(self) -> None:
        """Version 0 becomes the current one. Raises ValueError for an unknown kind or another version."""
        if self.kind not in self.versions:
            raise ValueError(
                f"kind: expected one of {', '.join(self.versions)}, got {self.kind!r}; take it from choose_layout"
            )
        current = self.versions[self.kind]
        if self.version == 0:
            object.__setattr__(self, "version", current)
        if self.version != current:
            raise ValueError(
                f"version: expected {current} for kind {self.kind!r}, got {self.version}; "
                "repack the weight with this version of sliderquant_kernels"
            )

    @property
    def groups(self) -> int:
        """Scales per output channel, G."""
        return 1 if self.group_size is None else self.k // self.group_size

    def metadata(self) -> dict[str, Any]:
        """The fields as plain data, for `from_metadata`."""
        return asdict(self)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> Self:
        """The layout that `metadata` describes. Raises ValueError for another version, kind or set of fields."""
        names = {field.name for field in fields(cls)}
        if set(metadata) != names:
            raise ValueError(f"metadata: expected the fields {sorted(names)}, got {sorted(metadata)}")
        return cls(**metadata)

    def _check_parts(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        """Raise ValueError or TypeError unless shapes, dtypes, codes and devices are those of one weight."""
        top = 2**self.bits - 1
        check_codes("codes", codes, (self.n, self.k), top)
        if tuple(scale.shape) != (self.n, self.groups):
            raise ValueError(f"scale: expected shape {(self.n, self.groups)}, got {tuple(scale.shape)}")
        if scale.dtype not in DTYPES:
            raise TypeError(f"scale: expected float16, bfloat16 or float32, got {scale.dtype}; convert it")
        if (zero_point is None) != self.symmetric:
            raise ValueError(
                f"zero_point: expected {'None' if self.symmetric else 'a tensor'} with symmetric={self.symmetric}, "
                f"got {'None' if zero_point is None else 'a tensor'}; choose the layout for the weight's symmetry"
            )
        if zero_point is not None:
            check_codes("zero_point", zero_point, (self.n, self.groups), top)
        devices = {t.device for t in (codes, scale, zero_point) if t is not None}
        if len(devices) != 1:
            raise ValueError(
                f"codes, scale, zero_point: expected one device, got {sorted(map(str, devices))}; move them"
            )


def check_codes(name: str, tensor: Tensor, shape: tuple[int, int], top: int) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name}: expected dtype torch.uint8, got {tensor.dtype}; convert it")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.numel() and int(tensor.max()) > top:
        raise ValueError(f"{name}: expected values in 0..{top}, got {int(tensor.max())}; quantize to this many bits")


def check_specs(packed: PackedWeight, specs: tuple[TensorSpec | None, ...], layout: str) -> None:
    """Raise ValueError or TypeError, naming the tensor, unless `packed` has the shapes and dtypes of `specs`.

    layout: words for the message.
    """
    for name, tensor, spec in zip(PackedWeight._fields, packed, specs, strict=True):
        if (tensor is None) != (spec is None):
            raise ValueError(
                f"{name}: expected {'None' if spec is None else 'a tensor'} for {layout}, got "
                f"{'None' if tensor is None else 'a tensor'}; pack with layout.pack"
            )
        if tensor is None or spec is None:
            continue
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(
                f"{name}: expected shape {spec.shape} for this layout, got {tuple(tensor.shape)}; "
                "pack with the layout that is passed to the op"
            )
        if tensor.dtype != spec.dtype and (spec.dtype is not None or tensor.dtype not in DTYPES):
            wanted = spec.dtype or "float16, bfloat16 or float32"
            raise TypeError(f"{name}: expected dtype {wanted}, got {tensor.dtype}; pack with layout.pack")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; call contiguous()")
