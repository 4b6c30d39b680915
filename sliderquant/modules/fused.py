"""The parts of a decoder layer between its linears, by one kernel each (`sliderquant_kernels.elementwise.op`).

The modules keep their places, classes and tensors; their `forward` is replaced, on the instance.
"""

import copy
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from sliderquant.models.family import Family
from sliderquant.models.layer import model_layers
from sliderquant.modules.linear import PackedLinear
from sliderquant.modules.rotated import RotatedLinear
from sliderquant_kernels import quantize_activations, rms_norm, rotary, silu_mul

__all__ = ["fuse_layers", "fused_rotary"]

_SILU = type(ACT2FN["silu"])


def fuse_layers(model: nn.Module, family: Family) -> None:
    """Replace the forward of every RMSNorm and of every gated MLP in a model of a family, in place.

    Activation functions other than SiLU stay as they are.
    """
    layers = list(model_layers(model, family))
    norms = [module.get_submodule(name) for layer, module in layers for name in layer.norms]
    for norm in [*norms, model.get_submodule(family.final_norm)]:
        norm.forward = _Norm(norm)
    for mlp in [module.get_submodule(mlp.module) for layer, module in layers for mlp in layer.mlps]:
        if isinstance(mlp.act_fn, _SILU | nn.SiLU):
            mlp.forward = _GatedMlp(mlp)


@contextmanager
def fused_rotary(model: nn.Module, family: Family) -> Iterator[None]:
    """Let the attention modules of a model rotate queries and keys by one kernel, for a while.

    transformers calls a function of the module's file there, which is replaced for every model of that file; it
    computes the same.
    """
    layers = model_layers(model, family)
    files = {type(module.get_submodule(layer.attention.module)).__module__ for layer, module in layers}
    with ExitStack() as stack:
        for file in [sys.modules[name] for name in files]:
            before = getattr(file, "apply_rotary_pos_emb", None)
            if before is not None:
                file.apply_rotary_pos_emb = _rotary_or(before)  # type: ignore[attr-defined]
                stack.callback(setattr, file, "apply_rotary_pos_emb", before)
        yield


class _Forward:
    """The forward of a module, which it does not keep alive: the module holds it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        """Whose forward it is."""
        return self._module()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return type(self)(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return type(self), (self.module,)


class _Norm(_Forward):
    """That of an RMSNorm."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        norm = self._module()
        return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[union-attr, arg-type]


class _GatedMlp(_Forward):
    """That of an MLP: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __call__(self, x: Tensor) -> Tensor:
        mlp: Any = self._module()
        gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
        linear: Any = down.linear if isinstance(down, RotatedLinear) else down
        if not _takes_gate(linear, up) or down._forward_hooks or down._forward_pre_hooks:
            return down(silu_mul(gate, up))
        # SiLU, the product, the rotation and the rounding in one kernel.
        bits, symmetric, clip = linear.scheme.activation_bits, linear.scheme.activation_symmetric, linear.input_clip
        if linear is down:
            return linear.multiply(quantize_activations(up, bits, symmetric, gate=gate, clip=clip))
        return linear.multiply(down.rotation.quantize(up, bits, symmetric, clip, gate))


def _takes_gate(linear: Any, x: Tensor) -> bool:
    """Whether the kernel that rounds the input of a linear computes silu(gate) * x before it. On a CPU the linear
    rounds in the loop that multiplies."""
    return (
        x.is_cuda
        and isinstance(linear, PackedLinear)
        and linear.scheme.quantizes_activations
        and x.dtype == linear.dtype
    )


def _rotary_or(other: Any) -> Any:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if arguments or keywords:
            return other(q, k, cos, sin, *arguments, **keywords)
        return rotary(q, k, cos, sin)

    return apply_rotary_pos_emb
