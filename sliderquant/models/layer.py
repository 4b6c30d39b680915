"""What one decoder layer is made of: its linears, what they read and feed, and how it is called.

Whatever needs the parts of a layer asks a `LayerSpec`: rounding, rotating, scaling, merging, learning, and the
estimates of memory. `describe_layer` makes one for each layer of a model, from the names of the family and the sizes in
config.json, so that layers may differ from each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sliderquant.models.family import Family

__all__ = ["Attention", "LayerSpec", "LinearGroup", "Mlp", "describe_layer", "first_output", "model_layers"]


@dataclass(frozen=True)
class LinearGroup:
    """Linears that multiply the same tensor; they are children of one module.

    Attributes:
        linears: names in the layer.
        norm: the RMSNorm in the layer whose output the tensor is; None: it is the output of no norm.
        kept: linears that multiply the same tensor and stay in 16 bits: the router of a layer with experts.
    """

    linears: tuple[str, ...]
    norm: str | None = None
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attention:
    """The attention of a layer, by names in the layer; see `AttentionNames`.

    Attributes:
        query, key, value: the linears that make them; None: one linear makes several of them (a fused projection).
        heads, kv_heads: of queries, and of keys and values.
        head_dim: channels of a head.
    """

    module: str
    query: str | None
    key: str | None
    value: str | None
    output: str
    query_norm: str | None
    key_norm: str | None
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Mlp:
    """A gated MLP of a layer, by names in the layer; in a layer with experts, one of them, or the shared one.

    Attributes:
        gate, up: the linears whose outputs are multiplied; None: one linear makes both (a fused projection).
        down: the linear that reads the products.
        size: channels that `down` reads.
    """

    module: str
    gate: str | None
    up: str | None
    down: str
    size: int


@dataclass(frozen=True)
class LayerSpec:
    """Decoder layer `index` of a model. All names but `name` are names in the layer.

    Attributes:
        name: full name of the layer, `model.layers.3`.
        hidden_size: channels of the residual stream.
        groups: all linears that are quantized, those together that multiply the same tensor, in the order of the data
            flow.
        mlps: one, or the experts in their order, the shared one last.
        mlps_per_token: how many of the MLPs compute each token.
    """

    index: int
    name: str
    hidden_size: int
    groups: tuple[LinearGroup, ...]
    attention: Attention
    mlps: tuple[Mlp, ...]
    mlps_per_token: int = 1

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears that are quantized, in the order of the data flow."""
        return tuple(name for group in self.groups for name in group.linears)

    @property
    def full_linears(self) -> tuple[str, ...]:
        """The same by their names in the model."""
        return tuple(map(self.full, self.linears))

    def full(self, name: str) -> str:
        """The name in the model of what is called `name` in the layer."""
        return f"{self.name}.{name}"

    @property
    def normed_groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Each RMSNorm of the residual stream, and the linears that read it."""
        return tuple((group.norm, group.linears) for group in self.groups if group.norm is not None)

    @property
    def norms(self) -> tuple[str, ...]:
        """All RMSNorms of the layer."""
        heads = (self.attention.query_norm, self.attention.key_norm)
        return (*(norm for norm, _ in self.normed_groups), *(name for name in heads if name is not None))

    @property
    def feeds(self) -> tuple[tuple[str, str], ...]:
        """Pairs of linears of which the second reads what the first puts out, channel by channel: value and output,
        where each KV head is read by all of its query heads, and `up` and `down`."""
        found = [(self.attention.value, self.attention.output), *((mlp.up, mlp.down) for mlp in self.mlps)]
        return tuple((previous, following) for previous, following in found if previous is not None)

    @property
    def active_channels(self) -> int:
        """Channels between `up` and `down` that are computed for one token."""
        return self.mlps_per_token * max(mlp.size for mlp in self.mlps)


def describe_layer(family: Family, config: Any, index: int) -> LayerSpec:
    """The parts of decoder layer `index`.

    Args:
        config: the transformers configuration of the model.
    """
    names = family.attention

    def inside(module: str, name: str | None) -> Any:
        return None if name is None else f"{module}.{name}"

    query, key, value, output, query_norm, key_norm = (
        inside(names.module, name)
        for name in (names.query, names.key, names.value, names.output, names.query_norm, names.key_norm)
    )
    gate, up, down = (inside(family.mlp.module, name) for name in (family.mlp.gate, family.mlp.up, family.mlp.down))
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return LayerSpec(
        index=index,
        name=f"{family.layers}.{index}",
        hidden_size=int(config.hidden_size),
        groups=(
            LinearGroup((query, key, value), names.norm),
            LinearGroup((output,)),
            LinearGroup((gate, up), family.mlp.norm),
            LinearGroup((down,)),
        ),
        attention=Attention(names.module, query, key, value, output, query_norm, key_norm, heads, kv_heads, head_dim),
        mlps=(Mlp(family.mlp.module, gate, up, down, int(getattr(config, family.mlp.size))),),
    )


def model_layers(model: nn.Module, family: Family) -> Iterator[tuple[LayerSpec, nn.Module]]:
    """Every decoder layer of a transformers model, and what it is made of."""
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        yield describe_layer(family, model.config, index), layer


def first_output(out: Any) -> Tensor:
    """The hidden states `[batch, seqlen, hidden]` among what a decoder layer or its attention returns: some modules of
    transformers return them alone, others a tuple that begins with them."""
    return out[0] if isinstance(out, tuple) else out
