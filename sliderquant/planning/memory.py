"""What a run takes in memory, estimated from headers alone."""

import math

from sliderquant.models.layer import LayerSpec
from sliderquant.models.source import ModelSource
from sliderquant.planning.settings import OneShotSettings, Settings
from sliderquant.planning.windows import Window
from sliderquant.schemes import ModelScheme

__all__ = [
    "CHOOSING_STREAM_GB",
    "CHOOSING_TOKENS_AT_ONCE",
    "choosing_files",
    "choosing_memory",
    "optimizer_bytes",
    "refining_memory",
    "trying_memory",
]

_GB = 1e9
CHOOSING_TOKENS_AT_ONCE = 1024
"""Whose logits are in memory while choices are measured."""

CHOOSING_STREAM_GB = 8.0
"""Hidden states beyond this are kept in files meanwhile."""


def optimizer_bytes(
    source: ModelSource, scheme: ModelScheme, settings: Settings | OneShotSettings | None, windows: tuple[Window, ...]
) -> int:
    """AdamW's: two moments in fp32 of everything that is learned in the largest window. Channel scales, a vector or two
    a layer, and the clipping of activations are left out."""
    if not isinstance(settings, Settings):
        return 0

    def learned(layer: LayerSpec) -> int:
        count = 0
        for linear in layer.linears:
            out_features, in_features = source.shape(layer, linear)
            groups = scheme.linear.groups(in_features) if scheme.linear.fits(in_features) else 1
            count += settings.rank * (out_features + in_features)
            count += 2 * out_features * groups if settings.clipping else 0
            count += out_features * in_features if settings.weights else 0
        return count

    return 2 * 4 * max(map(len, windows)) * max(map(learned, source.layers))


def refining_memory(
    source: ModelSource,
    scheme: ModelScheme,
    settings: Settings | OneShotSettings | None,
    windows: tuple[Window, ...],
    samples: int,
    seqlen: int,
    layer_weights: int,
) -> tuple[int, int]:
    """Bytes on the device and on the host. A layer that is refined holds, in fp32, its weights, their fake-quantized
    values and the gradients of these, and for a while two tensors more of the same size; where every weight is learned,
    its offset and this one's gradient, and with hardening the offsets that stay, and which; the optimizer's state; and
    the activations of a batch that autograd keeps, some 16 hidden and 5 intermediate vectors a token. What is rounded
    on the way, once for all that read it, is kept besides."""
    config = source.config
    if settings is None:
        return 4 * layer_weights * 4, 4 * layer_weights * 4
    if not isinstance(settings, Settings):
        return _one_shot_memory(source, settings, samples, seqlen, layer_weights)
    largest = max(len(window) for window in windows)

    def kept(layer: LayerSpec) -> int:
        vectors = _layer_activations(layer)
        if scheme.quantizes_activations:
            vectors += 2 * sum(source.shape(layer, group.linears[0])[1] for group in layer.groups)
        if scheme.quantizes_attention:
            attention = layer.attention
            vectors += 2 * (attention.heads + 2 * attention.kv_heads) * attention.head_dim
        return vectors

    activations = settings.batch_size * seqlen * max(map(kept, source.layers))
    tensors = 5 + 2 * settings.weights + 1.25 * settings.hardening
    device = largest * 4 * (math.ceil(tensors * layer_weights) + activations)
    device += optimizer_bytes(source, scheme, settings, windows)
    stream = samples * seqlen * config.hidden_size * 4
    in_memory = 3 * stream if stream <= settings.stream_memory_gb * _GB / 3 else 0
    embedding = config.vocab_size * config.hidden_size * 4
    return device, device + in_memory + embedding


def _one_shot_memory(
    source: ModelSource, settings: OneShotSettings, samples: int, seqlen: int, layer_weights: int
) -> tuple[int, int]:
    """Bytes on the device and on the host. All in fp32: a layer and its original; the largest weight some six times
    while it is rounded; X^T X of every input of the layer, and the largest once more in fp32 and, with its Cholesky
    factor and that one's inverse, in fp64; and the activations of a batch."""
    config = source.config

    def inputs(layer: LayerSpec) -> list[int]:
        return [source.shape(layer, group.linears[0])[1] for group in layer.groups]

    grams = max(sum(size**2 for size in inputs(layer)) for layer in source.layers)
    grams += 7 * max(size for layer in source.layers for size in inputs(layer)) ** 2
    rounding = 6 * _largest_linear(source)
    activations = settings.batch_size * seqlen * _activations(source)
    device = 4 * (2 * layer_weights + rounding + grams + activations)
    stream = samples * seqlen * config.hidden_size * 4
    embedding = config.vocab_size * config.hidden_size * 4
    return device, device + embedding + (stream if stream <= settings.stream_memory_gb * _GB else 0)


def choosing_memory(source: ModelSource, samples: int, seqlen: int, layer_weights: int) -> tuple[int, int]:
    """Bytes on the device and on the host while it is measured which linear needs which bits. All in fp32: a layer and
    its gradients, the largest weight some eight times while its clipping is searched, and the activations of a sample;
    or the head, and logits, their gradients and one tensor more of their size. On the host, the hidden states of all
    samples before every layer."""
    config = source.config
    largest = _largest_linear(source)
    activations = seqlen * _activations(source)
    head = config.vocab_size * (config.hidden_size + 3 * min(seqlen, CHOOSING_TOKENS_AT_ONCE))
    device = 4 * max(2 * layer_weights + 8 * largest + activations, head)
    streams = _choosing_streams(source, samples, seqlen)
    embedding = config.vocab_size * config.hidden_size * 4
    return device, device + embedding + (streams if streams <= CHOOSING_STREAM_GB * _GB else 0)


def choosing_files(source: ModelSource, samples: int, seqlen: int) -> int:
    """Bytes of the hidden states meanwhile, where they are kept in temporary files; else 0."""
    streams = _choosing_streams(source, samples, seqlen)
    return streams if streams > CHOOSING_STREAM_GB * _GB else 0


def trying_memory(source: ModelSource, samples: int, seqlen: int, layer_weights: int) -> tuple[int, int]:
    """Bytes on the device and on the host while a seed of the rotations is tried. All in fp32: a layer and its rounded
    weights, the largest some six times while it is rounded, and the activations of a batch; or the head, and five
    tensors of the size of a batch's logits. On the host, the hidden states of the original, of the rounded model, and
    of one of them a layer further; what does not fit takes more reads of the model, not more memory."""
    config = source.config
    largest = _largest_linear(source)
    tokens = max(seqlen, CHOOSING_TOKENS_AT_ONCE)
    activations = 2 * tokens * _activations(source)
    head = config.vocab_size * (config.hidden_size + 5 * tokens)
    device = 4 * max(2 * layer_weights + 6 * largest + activations, head)
    streams = min(3 * samples * seqlen * config.hidden_size * 4, int(CHOOSING_STREAM_GB * _GB))
    return device, device + streams + config.vocab_size * config.hidden_size * 4


def _layer_activations(layer: LayerSpec) -> int:
    """Values that a layer makes of one token and that are in memory at a time."""
    return 16 * layer.hidden_size + 5 * layer.active_channels


def _activations(source: ModelSource) -> int:
    """The same, of the layer that makes the most."""
    return max(map(_layer_activations, source.layers))


def _largest_linear(source: ModelSource) -> int:
    """Weights of the largest linear that is quantized."""
    return max(math.prod(source.shape(layer, name)) for layer in source.layers for name in layer.linears)


def _choosing_streams(source: ModelSource, samples: int, seqlen: int) -> int:
    """Bytes of the hidden states before every layer, and after the last."""
    return (source.num_layers + 1) * samples * seqlen * source.config.hidden_size * 4
