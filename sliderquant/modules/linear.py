"""A linear layer whose weight stays packed: a thin module over `sliderquant_kernels`.

Its scheme says what the weight is multiplied with: the input as it is, or the input rounded to 4 or 8 bits per token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sliderquant.checkpoint.clips import Clip, clip_from, clip_tensor
from sliderquant.checkpoint.packing import INPUT_CLIP, pack, stored_shapes, unpack
from sliderquant.errors import CheckpointError, InputError
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.quantizer.grids import dequantize as dequantize_exactly
from sliderquant.schemes import Scheme
from sliderquant_kernels import (
    LowBitLayout,
    PackedWeight,
    QuantizedActivations,
    WeightLayout,
    choose_layout,
    choose_low_bit_layout,
    dequantize,
    direct_linear,
    direct_low_bit_linear,
    low_bit_linear,
    quantize_activations,
    weight_only_linear,
)
from sliderquant_kernels.activations.op import MAX_K
from sliderquant_kernels.common.direct import DirectLinear
from sliderquant_kernels.cpu.vnni import Rounding

__all__ = ["PackedLinear", "QuantizedLinear", "layout_for"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is codes, scales and zero-points, wherever they are kept.

    `state_dict` holds the tensors of the checkpoint format under the layer's own name, so that what `save_pretrained`
    writes is a checkpoint.

    Attributes:
        in_features, out_features: sizes of the dense weight `[out, in]`.
        scheme: how the weight is quantized.
        dtype: of the scales and of the computation: float32, bfloat16 or float16.
        bias: `[out]` or None.
        input_clip: factors on the ends of the range of each token that is rounded; None: 1. Numbers, not a tensor: no
            cast of the module changes them.
    """

    in_features: int
    out_features: int
    scheme: Scheme
    dtype: torch.dtype
    bias: Tensor | None
    input_clip: Clip | None

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, made anew at every access: model code that reads `linear.weight`, or its dtype
        or device, gets what it expects."""
        return self.dequantize()

    def quantized(self) -> QuantizedWeight:
        """The codes, scales (in `dtype`) and zero-points."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight `[out, in]` in `dtype`; None: the dtype of the module."""
        raise NotImplementedError

    def _replace(self, quantized: QuantizedWeight) -> None:
        """Take another weight of the same shape and scheme."""
        raise NotImplementedError

    def _replace_clip(self, clip: Clip) -> None:
        """Take another clipping of the input.

        Raises:
            CheckpointError: it is not that of the linears that it shares the rounded input with.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.scheme.bits}, group_size={self.scheme.group_size}, symmetric={self.scheme.symmetric}"
            + (f", activations={self.scheme.activations}" if self.scheme.quantizes_activations else "")
            + (f", input_clip=({self.input_clip[0]:.4g}, {self.input_clip[1]:.4g})" if self.input_clip else "")
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part, tensor in pack(self.quantized(), self.scheme).items():
            destination[prefix + part] = tensor
        if self.input_clip is not None:
            destination[prefix + INPUT_CLIP] = clip_tensor(self.input_clip)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        shapes = stored_shapes(self.scheme, self.out_features, self.in_features)
        names = [*shapes, *([] if self.input_clip is None else [INPUT_CLIP])]
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in names}}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if missing:
            missing_keys += missing
            return
        by = "weight_shape" if "weight_shape" in shapes else "weight"
        stored = state_dict[prefix + by]
        shape = tuple(stored.tolist() if by == "weight_shape" else stored.shape)
        if shape != (self.out_features, self.in_features):
            error_msgs.append(f"{prefix}{by} is {list(shape)}, expected [{self.out_features}, {self.in_features}]")
            return
        if self.input_clip is not None:
            try:
                self._replace_clip(clip_from(state_dict[prefix + INPUT_CLIP], prefix + INPUT_CLIP))
            except CheckpointError as error:
                error_msgs.append(str(error))
                return
        parts = {name: state_dict[prefix + name].to(self.device) for name in shapes}
        self._replace(unpack(parts, self.scheme))


class PackedLinear(QuantizedLinear):
    """`y = x @ dequantize(weight)^T + bias`, without the dense weight in memory.

    With a scheme that quantizes activations x is rounded first, each token to a grid of its own, and the product is one
    of integers: see `sliderquant_kernels.quantize_activations` and `low_bit_linear`.

    The layout of the packed weight belongs to a device and a dtype: moving the module packs it again, and its codes are
    never cast. `state_dict` does not depend on the layout.

    Attributes:
        layout: how the weight is packed in memory.
    """

    layout: WeightLayout | LowBitLayout
    _held: tuple[Tensor, Tensor | None, Clip | None, DirectLinear | None] | None
    packed_weight: Tensor
    packed_scale: Tensor
    packed_zero_point: Tensor | None

    def __init__(
        self,
        quantized: QuantizedWeight,
        scheme: Scheme,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        input_clip: Clip | None = None,
    ) -> None:
        """Pack a quantized weight for the device that it is on.

        Args:
            quantized: codes uint8 `[out, in]`, scale `[out, groups]`, zero_point uint8 `[out, groups]` or None.
            bias: `[out]`.
            dtype: None: that of the scale.
            input_clip: of the scheme's rounding of the input; None: none.

        Raises:
            InputError: the dtype is not one that it computes in, or the scheme does not round what is to be clipped.
        """
        super().__init__()
        if input_clip is not None and not scheme.quantizes_activations:
            raise InputError(f"input_clip {input_clip}: {scheme} does not round the input; expected None")
        self.out_features, self.in_features = quantized.codes.shape
        self.scheme, self.input_clip = scheme, input_clip
        self._held = None
        self._store(quantized, quantized.scale.dtype if dtype is None else dtype)
        self.register_parameter("bias", None)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(self.device, self.dtype), requires_grad=False)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        scheme: Scheme,
        bias: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        input_clip: Clip | None = None,
    ) -> "PackedLinear":
        """Move a quantized weight to `device` (None: where it is) and pack it there; the rest is as in `__init__`."""
        moved = QuantizedWeight(*(None if part is None else part.to(device) for part in quantized))  # type: ignore[arg-type]
        return cls(moved, scheme, bias, dtype=dtype, input_clip=input_clip)

    @property
    def device(self) -> torch.device:
        return self.packed_weight.device

    @property
    def packed(self) -> PackedWeight:
        """The packed tensors, as the kernels take them."""
        return PackedWeight(self.packed_weight, self.packed_scale, self.packed_zero_point)

    def quantized(self) -> QuantizedWeight:
        codes, scale, zero_point = self.layout.unpack(self.packed)
        return QuantizedWeight(codes, scale.to(self.dtype), None if self.scheme.symmetric else zero_point)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        wanted = self.dtype if dtype is None else dtype
        if isinstance(self.layout, LowBitLayout):
            return dequantize_exactly(self.quantized(), self.scheme).to(wanted)
        return dequantize(self.packed, self.layout, wanted)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` in `dtype` -> `[..., out]`."""
        direct = None if torch.compiler.is_compiling() else self._direct()
        if direct is not None and direct.fits(x):
            return direct(x)
        if not isinstance(self.layout, LowBitLayout):
            return weight_only_linear(x, self.packed, self.layout, self.bias)
        if x.dtype != self.dtype:
            raise TypeError(f"x: expected dtype {self.dtype} like the layer, got {x.dtype}; convert x or the layer")
        bits, symmetric = self.scheme.activation_bits, self.scheme.activation_symmetric
        return self.multiply(quantize_activations(x, bits, symmetric, clip=self.input_clip))

    def multiply(self, activations: QuantizedActivations) -> Tensor:
        """`forward` for inputs that are rounded already; of a scheme that quantizes activations."""
        assert isinstance(self.layout, LowBitLayout)
        return low_bit_linear(activations, self.packed, self.layout, self.dtype, self.bias)

    def _direct(self) -> DirectLinear | None:
        """`forward` with the tensors that the module holds now; None: it has no short cut on this device."""
        weight, bias, clip = self._buffers["packed_weight"], self._parameters["bias"], self.input_clip
        held = self._held
        if held is None or held[0] is not weight or held[1] is not bias or held[2] is not clip:
            assert isinstance(weight, Tensor)
            direct: DirectLinear | None
            if isinstance(self.layout, LowBitLayout):
                rounding = Rounding(self.scheme.activation_bits, self.scheme.activation_symmetric, clip)
                direct = direct_low_bit_linear(self.packed, self.layout, self.dtype, bias, rounding)
            else:
                direct = direct_linear(self.packed, self.layout, bias)
            held = self._held = (weight, bias, clip, direct)
        return held[3]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def _replace(self, quantized: QuantizedWeight) -> None:
        self._store(quantized, self.dtype)

    def _replace_clip(self, clip: Clip) -> None:
        self.input_clip = clip

    def _store(self, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            expected = ", ".join(str(known) for known in _DTYPES)
            raise InputError(f"dtype {dtype}: a packed linear computes in {expected}; its codes cannot be cast")
        codes, scale, zero_point = quantized
        self.dtype = dtype
        self.layout = layout_for(self.scheme, self.out_features, self.in_features, codes.device, dtype)
        packed = self.layout.pack(codes, scale.to(dtype), zero_point)
        # Not persistent: what is saved is the checkpoint format, see _save_to_state_dict.
        self.register_buffer("packed_weight", packed.weight, persistent=False)
        self.register_buffer("packed_scale", packed.scale, persistent=False)
        self.register_buffer("packed_zero_point", packed.zero_point, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """What `.to`, `.half`, `.cuda` and the like call: pack again for a new device or dtype."""
        before = torch.empty(1, dtype=self.dtype, device=self.device)
        after = fn(before)
        if after.is_meta or self.device.type == "meta":
            moved = {name: None if buffer is None else fn(buffer) for name, buffer in self._buffers.items()}
        elif (after.dtype, after.device) != (before.dtype, before.device):
            codes, scale, zero_point = self.quantized()
            zero_point = None if zero_point is None else fn(zero_point)
            self._store(QuantizedWeight(fn(codes), fn(scale), zero_point), after.dtype)
            moved = dict(self._buffers)
        else:
            # A layout may hold its scales in another dtype than the module's, which a cast must not touch.
            moved = {name: _same_dtype(fn, buffer) for name, buffer in self._buffers.items()}
        # The bias is an ordinary parameter.
        self._buffers = {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = moved
        return self


def layout_for(
    scheme: Scheme, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> WeightLayout | LowBitLayout:
    """The layout of a packed weight of a scheme on a device, for a computation in `dtype`.

    Raises ValueError for a shape that the kernels do not compute.
    """
    shape = (scheme.bits, out_features, in_features, scheme.group_size, scheme.symmetric)
    if not scheme.quantizes_activations:
        return choose_layout(*shape, device, dtype)
    if in_features > MAX_K:
        raise ValueError(f"{in_features} inputs: at most {MAX_K} are quantized per token; use W{scheme.bits}A16")
    return choose_low_bit_layout(*shape, device)


def _same_dtype(fn: Callable[[Tensor], Tensor], buffer: Tensor | None) -> Tensor | None:
    if buffer is None:
        return None
    moved = fn(buffer)
    return moved if moved.dtype == buffer.dtype else buffer
