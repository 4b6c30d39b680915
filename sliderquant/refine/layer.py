"""A decoder layer with what is learned in it: how it is built, started, read, restored and merged."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sliderquant.calibration.layerwise import LayerwiseModel, RunningLayer
from sliderquant.checkpoint.packing import INPUT_CLIP
from sliderquant.models.layer import LayerSpec
from sliderquant.planning.plan import Plan
from sliderquant.quantizer.grids import QuantizedWeight
from sliderquant.refine.activation_clipping import ActivationClipping
from sliderquant.refine.attention import LearnedRounding, learn_rounding
from sliderquant.refine.compiling import can_compile
from sliderquant.refine.linear import STARTED, RefinedLinear, WeightGroup, generator_for
from sliderquant.refine.scales import ChannelScale, ScaledNorm
from sliderquant.refine.shared import SharedInput
from sliderquant.refine.sites import Site, insert_scales, scale_sites, start_from_statistics
from sliderquant.refine.weight_clipping import start_from_search
from sliderquant.schemes import Scheme

__all__ = [
    "learned_parameters",
    "learned_state",
    "merged_layer",
    "refined_layer",
    "refined_linears",
    "restore_learned",
    "starting",
    "stored_clips",
]


def refined_layer(plan: Plan, model: LayerwiseModel, index: int, seed: int) -> RunningLayer:
    """Decoder layer `index` with refined linears in the places of its linears."""
    settings = plan.learning
    compiled = _compiles(plan, model.device)
    running = model.layer(index, lambda module: _refine(module, plan, index, seed, compiled))
    if plan.scheme.quantizes_attention:
        start = settings.activation_clipping_start if plan.clips_activations else None
        learn_rounding(running.module.get_submodule(running.spec.attention.module), compiled, start)
        running.module.to(model.device)
    return running


def _refine(module: nn.Module, plan: Plan, index: int, seed: int, compiled: bool) -> None:
    """Put refined linears into the places of a layer's, in place, and channel scales where the settings have them."""
    settings, spec = plan.learning, plan.source.layers[index]
    groups: dict[tuple[int, Scheme], WeightGroup] = defaultdict(WeightGroup)
    clips = plan.clips_activations and plan.scheme.quantizes_activations
    for group in spec.groups:
        # With --per-channel-fallback linears that share an input may differ in grouping, never in how it is rounded.
        clipping = ActivationClipping(settings.activation_clipping_start) if clips else None
        shared = SharedInput(len(group.linears), clipping)
        for name in group.linears:
            linear, scheme = module.get_submodule(name), plan.schemes[spec.full(name)]
            refined = RefinedLinear(
                linear.weight,  # type: ignore[arg-type]
                linear.bias,  # type: ignore[arg-type]
                scheme,
                plan.source.dtype,
                settings,
                generator_for(seed, spec.full(name)),
                shared,
                groups[linear.weight.shape[1], scheme],  # type: ignore[index]
            )
            refined.compiled = compiled
            module.set_submodule(name, refined)
    if settings.scales.used_with(plan.scheme):
        log = settings.scales.space == "log"
        insert_scales(module, _sites(plan, spec), refined_linears(module), log, plan.source.dtype)


@torch.no_grad()
def stored_clips(layer: nn.Module) -> dict[str, Tensor]:
    """By name of the tensor in a refined decoder layer, what is stored of the learned clipping of activations, queries,
    keys and values, fp32 `[2]`: see `sliderquant.refine.activation_clipping`."""
    linears = refined_linears(layer)
    clips = {f"{name}.{INPUT_CLIP}": linear.input_clipping for name, linear in linears.items()}
    for name, child in layer.named_modules():
        if isinstance(child, LearnedRounding):
            attention = name.rpartition(".")[0]
            clips |= {f"{attention}.{site}_clip": clip for site, clip in child.learned_clips.items()}  # type: ignore[misc]
    return {name: clip.stored() for name, clip in clips.items() if clip is not None}


@contextmanager
def starting(plan: Plan, layer: RunningLayer) -> Iterator[None]:
    """Within it the unquantized layer sees its calibration inputs; then what is learned is where it starts."""
    settings, linears = plan.learning, refined_linears(layer.module)
    with ExitStack() as stack:
        if settings.clipping and settings.clipping_start == "search":
            stack.enter_context(start_from_search(linears))
        # Left first: the clipping is searched for scaled weights.
        if settings.scales.used_with(plan.scheme) and settings.scales.start != "ones":
            outliers_only = settings.scales.start == "outliers"
            sites = _sites(plan, layer.spec)
            stack.enter_context(start_from_statistics(layer.module, sites, linears, outliers_only))
        yield
    for linear in linears.values():
        linear.start()


def _sites(plan: Plan, layer: LayerSpec) -> dict[str, Site]:
    return scale_sites(layer, plan.rotations is not None and "R4" in plan.rotations.transforms)


def _compiles(plan: Plan, device: torch.device) -> bool:
    """Whether the quantizers are compiled: it takes some 10 s, and is taken to save, in every step and for every
    layer, 0.15 ms a linear and 3 ns a weight: an estimate, which only has to tell long runs from short ones. On a GPU
    it has not been tried yet: there it is when it is asked for."""
    if plan.learning.compile == "always":
        return can_compile(device.type, plan.source.dtype)
    if plan.learning.compile == "never" or device.type != "cpu":
        return False
    saved = plan.work * (1.5e-4 * len(plan.source.layers[0].linears) + 3e-9 * plan.layer_weights)
    return saved > 10 and can_compile(device.type, plan.source.dtype)


_KINDS = {
    "offset": "weights",
    "low_rank_a": "low_rank",
    "low_rank_b": "low_rank",
    "clip_low": "clipping",
    "clip_high": "clipping",
}


def refined_linears(module: nn.Module) -> dict[str, RefinedLinear]:
    """The refined linears inside `module`, by the names in it of the linears whose places they take."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, RefinedLinear)}
    # Behind an online rotation it is the child `linear` of what stands in its place.
    return {name.removesuffix(".linear"): child for name, child in found.items()}


def learned_parameters(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """What is learned inside `module`: by kind, named as its learning rate, and by name."""
    kinds = ("weights", "low_rank", "clipping", "scales", "activation_clipping")
    found: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in kinds}
    for name, child in module.named_modules():
        for own, parameter in child.named_parameters(recurse=False):
            if isinstance(child, RefinedLinear):
                found[_KINDS[own]][f"{name}.{own}"] = parameter
            elif isinstance(child, ChannelScale):
                found["scales"][f"{name}.{own}"] = parameter
            elif isinstance(child, ActivationClipping):
                found["activation_clipping"][f"{name}.{own}"] = parameter
    return found


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what was learned inside `module`, and of what it is counted from, by name; `restore_learned` takes it
    back."""
    kinds = learned_parameters(module).values()
    state = {name: parameter.detach().clone() for kind in kinds for name, parameter in kind.items()}
    for name, child in module.named_modules():
        if isinstance(child, RefinedLinear):
            started = ((own, getattr(child, own)) for own in STARTED)
            state |= {f"{name}.{own}": tensor.clone() for own, tensor in started if tensor is not None}
    return state


@torch.no_grad()
def restore_learned(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `learned_state` returned."""
    for kind in learned_parameters(module).values():
        for name, parameter in kind.items():
            parameter.copy_(state[name])
    for name, child in module.named_modules():
        if isinstance(child, RefinedLinear):
            for own in STARTED:
                tensor = state.get(f"{name}.{own}")
                setattr(child, own, None if tensor is None else tensor.clone())


@torch.no_grad()
def merged_layer(layer: nn.Module) -> tuple[dict[str, tuple[QuantizedWeight, Tensor]], dict[str, Tensor]]:
    """What is stored of a refined decoder layer: by name of the linear, what `merge` returns; and by name of the
    tensor, the norms and biases that channel scales were merged into, fp32, with values that their dtypes hold."""
    linears = refined_linears(layer)
    dense = {f"{name}.weight": child.weight() for name, child in layer.named_modules() if isinstance(child, ScaledNorm)}
    for name, linear in linears.items():
        bias = linear.effective_bias()
        if linear.row is not None and bias is not None:
            dense[f"{name}.bias"] = bias
    return {name: linear.merge() for name, linear in linears.items()}, dense
