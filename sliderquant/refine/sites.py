"""The places of a decoder layer that have channel scales, and the scales put into them; see `scales`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sliderquant.models.layer import LayerSpec
from sliderquant.refine.linear import RefinedLinear
from sliderquant.refine.scales import ChannelScale, ScaledNorm, Spread

__all__ = ["Site", "insert_scales", "scale_sites", "start_from_statistics"]

_OUTLIER = 4.0  # times the median of a site


@dataclass(frozen=True)
class Pattern:
    """A `Spread` without its scale."""

    index: Tensor | None = None
    inverse: bool = False


@dataclass(frozen=True)
class Site:
    """One of the places; by name in the layer, how alpha is spread.

    Attributes:
        size: of alpha.
        norms: whose weights are divided.
        columns: linears whose columns are multiplied.
        rows: linears whose rows are divided.
    """

    size: int
    norms: Mapping[str, Pattern]
    columns: Mapping[str, Pattern]
    rows: Mapping[str, Pattern]


def scale_sites(layer: LayerSpec, rotated_down: bool) -> dict[str, Site]:
    """The places of a decoder layer that have an alpha, by the name of what is divided. Where one linear makes queries,
    keys and values together, or gates and what they are multiplied with, those have none.

    Args:
        rotated_down: a rotation stands before down_proj.
    """
    attention = layer.attention
    heads, values, head_dim = attention.heads, attention.kv_heads, attention.head_dim
    plain = Pattern()
    sites = {
        norm: Site(layer.hidden_size, {norm: plain}, dict.fromkeys(readers, plain), {})
        for norm, readers in layer.normed_groups
    }
    if attention.value is not None:
        channels = torch.arange(values * head_dim).view(values, 1, head_dim).expand(-1, heads // values, -1).flatten()
        columns = {attention.output: Pattern(channels)}
        sites[attention.value] = Site(values * head_dim, {}, columns, {attention.value: plain})
    for mlp in layer.mlps if not rotated_down else ():
        if mlp.up is not None:
            sites[mlp.up] = Site(mlp.size, {}, {mlp.down: plain}, {mlp.up: plain})
    if attention.query is None or attention.key is None:
        return sites
    # RoPE rotates channel i of a head with channel i + head_dim / 2.
    pairs = torch.arange(head_dim // 2).repeat(2)
    if attention.query_norm is not None and attention.key_norm is not None:
        norms = {attention.query_norm: Pattern(pairs), attention.key_norm: Pattern(pairs, inverse=True)}
        sites[attention.query] = Site(head_dim // 2, norms, {}, {})
    else:
        of_keys = torch.arange(values)[:, None] * (head_dim // 2) + pairs
        of_queries = of_keys.repeat_interleave(heads // values, 0)
        rows = {attention.query: Pattern(of_queries.flatten()), attention.key: Pattern(of_keys.flatten(), inverse=True)}
        sites[attention.query] = Site(values * head_dim // 2, {}, {}, rows)
    return sites


def insert_scales(
    layer: nn.Module,
    sites: Mapping[str, Site],
    linears: Mapping[str, RefinedLinear],
    log: bool,
    stored_dtype: torch.dtype,
) -> None:
    """Give a decoder layer a `ChannelScale` for every site, as its child `channel_scales`.

    Args:
        linears: of the layer, by name.
        log: learn logarithms.
        stored_dtype: of norms and biases.
    """
    scales = nn.ModuleDict()
    for name, site in sites.items():
        device = next(iter(linears.values())).weight.device
        scale = ChannelScale(site.size, log, device)
        scales[_key(name)] = scale
        for norm, pattern in site.norms.items():
            layer.set_submodule(
                norm, ScaledNorm(layer.get_submodule(norm), _spread(scale, pattern, device), stored_dtype)
            )
        for linear, pattern in site.columns.items():
            linears[linear].column = _spread(scale, pattern, device)
        for linear, pattern in site.rows.items():
            linears[linear].row = _spread(scale, pattern, device)
    layer.channel_scales = scales


@contextmanager
def start_from_statistics(
    layer: nn.Module, sites: Mapping[str, Site], linears: Mapping[str, RefinedLinear], outliers_only: bool = False
) -> Iterator[None]:
    """Within it the layer, unquantized, sees its calibration inputs; afterwards every alpha starts with

    sqrt(max |x_j| / max |w_j|)       x what the columns read, w the columns (SmoothQuant, arXiv 2211.10438, eq. 4)
    sqrt(max |q_j| / max |k_j|)       for queries and keys, of the norms of rotary pairs

    Args:
        outliers_only: divide by the median of the site, and start with 1 where no more than 4 is left.
    """
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, site in sites.items():
        for column in list(site.columns)[:1]:
            hooks.append(linears[column].register_forward_pre_hook(_largest_input(seen, name)))
        for pair in (*site.rows, *site.norms) if not site.columns else ():
            hooks.append(layer.get_submodule(pair).register_forward_hook(_largest_pair(seen, pair, site)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        for name, site in sites.items():
            scale: ChannelScale = layer.channel_scales[_key(name)]  # type: ignore[index,assignment]
            if site.columns:
                weights = torch.stack([linears[column].weight.abs().amax(0) for column in site.columns]).amax(0)
                index = next(iter(site.columns.values())).index
                found = _reduced(seen[name], index, site.size) / _reduced(weights, index, site.size)
            else:
                queries, keys = (
                    _reduced(seen[pair], pattern.index, site.size)
                    for pair, pattern in {**site.rows, **site.norms}.items()
                )
                found = queries / keys
            alpha = found.sqrt()
            if outliers_only:
                alpha = alpha / alpha[alpha.isfinite()].median()
                alpha = torch.where(alpha > _OUTLIER, alpha, 1.0)
            scale.start(alpha)


def _largest_input(seen: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        largest = arguments[0].detach().abs().flatten(0, -2).amax(0)
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    return hook


def _largest_pair(seen: dict[str, Tensor], name: str, site: Site) -> Any:
    """Of an output `[..., heads * head_dim]` or `[..., head_dim]`: the norm of each channel with its partner, which
    RoPE leaves as it is."""
    pattern = {**site.rows, **site.norms}[name]
    assert pattern.index is not None
    # The first channel of a head is where the index of its partner is the same, half a head further.
    head_dim = 2 * int((pattern.index == pattern.index[0]).nonzero()[1])

    def hook(_: nn.Module, arguments: Any, output: Tensor) -> None:
        halves = output.detach().unflatten(-1, (-1, 2, head_dim // 2))
        norms = halves.square().sum(-2, keepdim=True).sqrt().expand_as(halves).flatten(-3)
        largest = norms.flatten(0, -2).amax(0)
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    return hook


def _reduced(per_channel: Tensor, index: Tensor | None, size: int) -> Tensor:
    """The largest value of the channels that share an alpha."""
    if index is None:
        return per_channel
    return per_channel.new_zeros(size).scatter_reduce_(0, index.to(per_channel.device), per_channel, "amax")


def _spread(scale: ChannelScale, pattern: Pattern, device: torch.device) -> Spread:
    return Spread(scale, None if pattern.index is None else pattern.index.to(device), pattern.inverse)


def _key(name: str) -> str:
    return name.replace(".", "-")  # a module's name has no dots
