"""Linear layers that read the same input, as one packed weight: one kernel launch instead of two or three, and an input
that is quantized, where the scheme says so, once.

The weights of q_proj, k_proj and v_proj (gate_proj and up_proj) are concatenated along their outputs and packed as one
`MergedLinear`. In the places of the layers are `LinearSlice`s, so that the model's own code runs unchanged and the
names in `state_dict` stay those of the checkpoint. While the module that holds the layers runs, the first slice that is
called computes the product for all, and the others find their part of it.

A product is never taken for that of another input:

- It is kept only inside a call of the module that holds the layers: hooks on that module begin and end it, also when
  the call raises. A slice that is called from elsewhere computes for itself.
- It is kept for one tensor object in one state: another tensor, or the same one after an in-place change, is computed
  anew. (While tracing, and for tensors made under `torch.inference_mode`, changes are not counted: there, the module
  must not change its input in place between two of the layers. No supported model does.)
- It is kept per thread, each part is handed out once, and with the last part nothing is left.
"""

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sliderquant.checkpoint.clips import Clip
from sliderquant.errors import CheckpointError, InputError
from sliderquant.models import FAMILIES, family_of_class
from sliderquant.models.layer import model_layers
from sliderquant.modules.linear import PackedLinear, QuantizedLinear, layout_for
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.schemes import Scheme

__all__ = ["LinearSlice", "MergedLinear", "can_merge", "concatenate", "merge_linears", "shared_inputs", "split_linears"]


# With more tokens on a CPU each part is written to memory of its own: what reads strided parts, SiLU, products and
# rotary embeddings, takes up to twice as long.
MAX_STRIDED_TOKENS = 48


class _Call:
    """A call of the module that holds the linears, and what is left of the product in it."""

    def __init__(self) -> None:
        self.open = False
        self.drop()

    def drop(self) -> None:
        self.x: Tensor | None = None
        self.version: int | None = None
        self.parts: list[Tensor | None] = []

    # The state of a call is no part of a module that is copied or pickled.
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Call":
        return type(self)()

    def __reduce__(self) -> tuple[type["_Call"], tuple[()]]:
        return type(self), ()


class _CallOfThread(threading.local, _Call):
    """Each thread its own."""


class MergedLinear(PackedLinear):
    """The packed weights of several linears `[out_i, in]` as one `[sum of out_i, in]`.

    A shared child of its slices, which are what a model calls and what `state_dict` holds.

    Attributes:
        sizes: the outputs of each of the linears.
    """

    def __init__(
        self,
        quantized: QuantizedWeight,
        scheme: Scheme,
        sizes: Sequence[int],
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        input_clip: Clip | None = None,
    ) -> None:
        """Pack concatenated weights for the device that they are on.

        Args:
            quantized: of all linears, concatenated along the outputs; the rest is as for a PackedLinear.
            sizes: the outputs of each linear; their sum is that of `quantized`.
        """
        super().__init__(quantized, scheme, bias, dtype=dtype, input_clip=input_clip)
        if sum(sizes) != self.out_features:
            raise InputError(f"sizes {list(sizes)}: expected a sum of {self.out_features}, the outputs of the weight")
        self.sizes = list(sizes)
        self._call = _CallOfThread()
        # torch.compile does not write what it traced back to a thread's own state. A program that holds all the slices
        # leaves nothing in this one either; with a graph break between them it is shared by all threads, and a product
        # is still only taken for the tensor that it belongs to.
        self._traced_call = _Call()
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: nn.Module, names: Sequence[str]) -> None:
        """Put slices in the places of the linears; they share the product in the forward of the module that holds them.

        Args:
            names: of the linears in `model`, children of one module.
        """
        parents = {name.rpartition(".")[0] for name in names}
        if len(parents) != 1 or len(names) != len(self.sizes):
            raise InputError(f"names {list(names)}: expected those of {len(self.sizes)} linears in one module")
        parent = model.get_submodule(parents.pop())
        start = 0
        for index, (name, size) in enumerate(zip(names, self.sizes, strict=True)):
            setattr(parent, name.rpartition(".")[2], LinearSlice(self, index, slice(start, start + size)))
            start += size
        self._hooks = [
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        """Remove what `attach` added to the parent, but for the slices."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def part(self, x: Tensor, index: int) -> Tensor:
        """The outputs `[..., out_i]` of linear `index` for x `[..., in]`; for few tokens, strided."""
        call = self._traced_call if torch.compiler.is_compiling() else self._call
        if not call.open:
            return self(x).split(self.sizes, -1)[index]
        version = _version(x)
        if call.x is not x or call.version != version or call.parts[index] is None:
            call.x, call.version, call.parts = x, version, [*self._products(x)]
        part = call.parts[index]
        assert part is not None
        call.parts[index] = None
        if all(left is None for left in call.parts):
            call.drop()
        return part

    def _products(self, x: Tensor) -> list[Tensor]:
        """The outputs of every linear, `[..., out_i]`."""
        if not torch.compiler.is_compiling() and x.numel() > MAX_STRIDED_TOKENS * self.in_features:
            direct = self._direct()
            if direct is not None and direct.fits(x):
                return list(direct.parts(x, self.sizes))
        return list(self(x).split(self.sizes, -1))

    def _begin(self, parent: nn.Module, arguments: Any) -> None:
        self._set_open(True)

    def _end(self, parent: nn.Module, arguments: Any, result: Any) -> None:
        self._set_open(False)

    def _set_open(self, value: bool) -> None:
        # The hooks of a module whose forward alone is compiled run outside of the program.
        for call in [self._traced_call] if torch.compiler.is_compiling() else [self._traced_call, self._call]:
            call.open = value
            call.drop()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing: the slices save it."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Nothing: the slices load it."""


class LinearSlice(QuantizedLinear):
    """One of the linears of a MergedLinear, in the place of the linear in the model."""

    def __init__(self, merged: MergedLinear, index: int, rows: slice) -> None:
        super().__init__()
        self.merged = merged
        self.index, self.rows = index, rows
        self.in_features, self.out_features = merged.in_features, rows.stop - rows.start
        self.scheme = merged.scheme

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.merged.dtype

    @property
    def device(self) -> torch.device:
        return self.merged.device

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return None if self.merged.bias is None else self.merged.bias[self.rows]

    @property
    def input_clip(self) -> Clip | None:  # type: ignore[override]
        return self.merged.input_clip

    def quantized(self) -> QuantizedWeight:
        return _rows(self.merged.quantized(), self.rows)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.merged.dequantize(dtype)[self.rows].clone()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` in `dtype` -> `[..., out]`, a view with strides of the merged product."""
        return self.merged.part(x, self.index)

    def _replace(self, quantized: QuantizedWeight) -> None:
        whole = self.merged.quantized()
        for part, new in zip(whole, quantized, strict=True):
            if part is not None and new is not None:
                part[self.rows] = new
        self.merged._replace(whole)

    def _replace_clip(self, clip: Clip) -> None:
        # The first of them is loaded first; the others have to agree.
        if self.index == 0:
            self.merged._replace_clip(clip)
        elif clip != self.input_clip:
            raise CheckpointError(
                f"input_clip {clip} of a linear that shares its rounded input with one of {self.input_clip}: expected "
                "the same; call sliderquant.modules.split_linears(model) before loading"
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach().clone()
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        key, rest = prefix + "bias", dict(state_dict)
        if self.bias is not None:
            value = rest.pop(key, None)
            if value is None:
                missing_keys.append(key)
            elif value.shape != self.bias.shape:
                error_msgs.append(f"{key} has shape {list(value.shape)}, expected {list(self.bias.shape)}")
            else:
                with torch.no_grad():
                    self.bias.copy_(value)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def shared_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of the linears that read the same input, group by group; none for a model of no supported family."""
    family = family_of_class(model)
    if family is None:
        return []
    return [
        tuple(map(layer.full, group.linears))
        for layer, _ in model_layers(model, family)
        for group in layer.groups
        if len(group.linears) > 1
    ]


def can_merge(
    shapes: Sequence[tuple[int, int]],
    schemes: Sequence[Scheme],
    biased: Sequence[bool],
    device: torch.device,
    dtype: torch.dtype,
    clips: Sequence[Clip | None] = (),
) -> bool:
    """Whether linears that read the same input can be one packed weight that computes as each of them would.

    They can when they have the same inputs and scheme, clip the input alike, all or none have a bias, and their kind of
    layout does not change: a CPU has fast layouts only for some numbers of outputs.

    Args:
        shapes: `(out, in)` of each of the linears.
        biased: whether each has a bias.
        device, dtype: of the computation.
        clips: the `input_clip` of each; empty: none has one.
    """
    if len({inputs for _, inputs in shapes}) > 1 or any(len(set(each)) > 1 for each in (schemes, biased, clips)):
        return False
    scheme, inputs = schemes[0], shapes[0][1]
    total = sum(outputs for outputs, _ in shapes)
    kinds = {
        layout_for(scheme, outputs, inputs, device, dtype).kind
        for outputs in (total, *(outputs for outputs, _ in shapes))
    }
    return len(kinds) == 1


@torch.no_grad()
def merge_linears(model: nn.Module) -> None:
    """Merge the packed linears of a model that read the same input, in place; `sliderquant.load` has done so already.

    Raises:
        InputError: the model is of no family whose parts are known.
    """
    groups = shared_inputs(model)
    if not groups:
        known = ", ".join(name for family in FAMILIES for name in family.architectures)
        raise InputError(f"model: {type(model).__name__} is not of a supported family; expected one of {known}")
    for names in groups:
        linears = [linear for name in names if isinstance(linear := model.get_submodule(name), PackedLinear)]
        # A layer that is not packed, or that was moved elsewhere, stays as it is, and its siblings too.
        if len(linears) < len(names) or len({(linear.device, linear.dtype) for linear in linears}) > 1:
            continue
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        schemes, biases = [linear.scheme for linear in linears], [linear.bias for linear in linears]
        first, clips = linears[0], [linear.input_clip for linear in linears]
        if not can_merge(shapes, schemes, [bias is not None for bias in biases], first.device, first.dtype, clips):
            continue
        codes, scales, zero_points = zip(*(linear.quantized() for linear in linears), strict=True)
        quantized = QuantizedWeight(torch.cat(codes), torch.cat(scales), concatenate(zero_points))
        sizes = [outputs for outputs, _ in shapes]
        merged = MergedLinear(
            quantized, first.scheme, sizes, concatenate(biases), dtype=first.dtype, input_clip=clips[0]
        )
        merged.attach(model, names)


def split_linears(model: nn.Module) -> None:
    """Give every linear its own packed weight again, in place: the inverse of `merge_linears`.

    Not needed to save a model: its `state_dict` holds the tensors of the single linears anyway.
    """
    found: dict[MergedLinear, list[tuple[nn.Module, str, LinearSlice]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, LinearSlice):
                found[child.merged].append((parent, name, child))
    for merged, places in found.items():
        whole = merged.quantized()
        for parent, name, child in places:
            quantized = _rows(whole, child.rows)
            single = PackedLinear(quantized, child.scheme, child.bias, dtype=child.dtype, input_clip=child.input_clip)
            setattr(parent, name, single)
        merged.detach()


def concatenate(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors one after the other along the outputs; None for none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _rows(quantized: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Copies: a view would keep the whole alive."""
    codes, scale, zero_point = quantized
    return QuantizedWeight(
        codes[rows].clone(), scale[rows].clone(), None if zero_point is None else zero_point[rows].clone()
    )


def _version(x: Tensor) -> int | None:
    # Neither tracing nor inference mode counts changes.
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
