"""Online rotations: what `sliderquant.rotations.folded` could not fold into weights.

R4 is a `RotatedLinear` in the place of every down_proj. For R3 see `sliderquant.modules.attention`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sliderquant.checkpoint.clips import Clip
from sliderquant.errors import InputError
from sliderquant.models.family import Family
from sliderquant.models.layer import LayerSpec, model_layers
from sliderquant.modules.linear import PackedLinear
from sliderquant.rotations.transforms import Rotation, Rotations
from sliderquant_kernels import QuantizedActivations, hadamard, hadamard_quantize, prepare_hadamard

__all__ = ["OnlineRotation", "RotatedLinear", "insert_rotation", "insert_rotations"]


class OnlineRotation(nn.Module):
    """`x -> (x * signs) R^T` over the last dimension.

    The signs are a buffer that `state_dict` does not hold: config.json describes them.
    """

    signs: Tensor

    def __init__(self, rotation: Rotation) -> None:
        """
        Raises:
            InputError: the rotation is of several heads with signs of their own.
        """
        super().__init__()
        if len(rotation.signs) != 1:
            raise InputError(f"rotation of {len(rotation.signs)} heads: an online rotation has the same signs for all")
        self.transform = rotation.transform
        self.register_buffer("signs", rotation.signs[0].clone(), persistent=False)
        self._prepare()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., size]` -> the same shape and dtype."""
        return hadamard(x, self.transform, self.signs.to(x.dtype))

    def quantize(
        self, x: Tensor, bits: int, symmetric: bool, clip: Clip | None = None, gate: Tensor | None = None
    ) -> QuantizedActivations:
        """x `[..., size]` rotated and, each row, rounded to `bits`.

        Args:
            clip: factors on the ends of a row's range.
            gate: like x: `silu(gate) * x` is rotated.
        """
        signs = self.signs.to(x.dtype)
        return hadamard_quantize(x, self.transform, bits, symmetric, signs=signs, gate=gate, clip=clip)

    def extra_repr(self) -> str:
        return f"{self.transform}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnlineRotation":
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _prepare(self) -> None:
        # What a GPU multiplies by is made here: the first call may be one that is captured into a CUDA graph.
        if self.signs.is_cuda:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                prepare_hadamard(self.transform, self.signs.device, dtype)


class RotatedLinear(nn.Module):
    """A linear layer, dense or packed, whose weight expects its input rotated.

    Stands in the linear's place: `state_dict` has the linear's tensors under the names that they had without it.
    """

    def __init__(self, linear: nn.Module, rotation: OnlineRotation) -> None:
        """
        Raises:
            InputError: the rotation is not of the size of the linear's input.
        """
        super().__init__()
        if rotation.transform.n != linear.in_features:
            raise InputError(
                f"rotation of size {rotation.transform.n}: expected {linear.in_features}, the linear's inputs"
            )
        self.linear, self.rotation = linear, rotation
        self.register_load_state_dict_pre_hook(_name_inner)

    @property
    def in_features(self) -> int:
        return self.linear.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.linear.out_features  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """That of the linear: its columns are rotated."""
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]`, not rotated -> `[..., out]`."""
        linear, rotation = self.linear, self.rotation
        if not isinstance(linear, PackedLinear) or not linear.scheme.quantizes_activations or x.dtype != linear.dtype:
            return linear(rotation(x))
        # One kernel rotates and rounds.
        bits, symmetric = linear.scheme.activation_bits, linear.scheme.activation_symmetric
        return linear.multiply(rotation.quantize(x, bits, symmetric, linear.input_clip))

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        return self.linear.state_dict(*arguments, **keywords)


def _name_inner(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give the linear's tensors the names under which loading will look for them."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}linear.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def insert_rotations(model: nn.Module, family: Family, rotations: Rotations) -> None:
    """`insert_rotation` in every layer of a model; the linears are as they are now, dense or packed."""
    for layer, module in model_layers(model, family):
        insert_rotation(module, layer, rotations)


def insert_rotation(module: nn.Module, layer: LayerSpec, rotations: Rotations | None) -> None:
    """Put the online rotation R4, where there is one, before the down_proj of a decoder layer, in place.

    Raises:
        InputError: there is a rotation already.
    """
    rotation = None if rotations is None else rotations.down(layer.index)
    if rotation is None:
        return
    for mlp in layer.mlps:
        linear = module.get_submodule(mlp.down)
        if isinstance(linear, RotatedLinear):
            raise InputError(f"layer {layer.index}: its {mlp.down} is rotated already")
        module.set_submodule(mlp.down, RotatedLinear(linear, OnlineRotation(rotation)))
