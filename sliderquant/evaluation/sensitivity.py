"""Which layers, and which kinds of linears, quantization hurts most.

A part of the model is a decoder layer, or one kind of linear (`q_proj`, ...) in all layers. Each part is rounded to
nearest alone, and then all of the model but it. Alone, a part shows what it costs by itself; left out, what is won back
by keeping it in 16 bits, with the errors of all the others around it.

One walk over the model makes all of these variants. Variants that agree on every layer so far share their hidden
states, so that quantizing layer i alone takes the layers from i on, and no more; each layer is read and rounded once
for as many blocks of text as memory holds. With rotations, all of it is about the rotated model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sliderquant.calibration.text import check_source
from sliderquant.calibration.tokens import vocabulary_of
from sliderquant.devices import deterministic, machine, resolve_device, versions
from sliderquant.errors import InputError
from sliderquant.evaluation.perplexity import evaluation_blocks
from sliderquant.evaluation.variants import Study, Sums, Variant, switched_kinds
from sliderquant.models.decoder import Decoder
from sliderquant.models.source import open_model
from sliderquant.planning.arguments import check_arguments
from sliderquant.planning.methods import method_named
from sliderquant.planning.plan import make_plan
from sliderquant.planning.request import Request
from sliderquant.progress import Progress
from sliderquant.rotations.folded import rotated
from sliderquant.schemes import ModelScheme, Scheme

__all__ = ["Effect", "Part", "Sensitivity", "sensitivity"]


@dataclass(frozen=True)
class Effect:
    """What a variant of the model puts out, against the original.

    Attributes:
        perplexity: of the variant.
        perplexity_change: this minus the perplexity of the original; where a part is left out, minus that of the model
            with everything quantized.
        output_error: squared error of the last hidden states, which the head reads, over their squares; all tokens.
        kl_divergence: KL(original || variant) of the distributions of the next token, in nats, mean over all tokens.
    """

    perplexity: float
    perplexity_change: float
    output_error: float
    kl_divergence: float


@dataclass(frozen=True)
class Part:
    """A decoder layer, or one kind of linear in all layers.

    Attributes:
        name: the index of the layer, or the last part of the linears' names.
        weights: number of weights in its linears.
        alone: nothing else is quantized.
        all_but: everything else is quantized.
    """

    name: str
    weights: int
    alone: Effect
    all_but: Effect


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`.

    Attributes:
        rotations: that were folded into the model first, as config.json describes them; None: none.
        linears: how many linears of each kind have which scheme.
        blocks, tokens: of text.
        passes: through a layer of the whole text, of all variants.
        original: perplexity of the original.
        everything: with every linear quantized.
        layers: in order.
        kinds: of linears, in the order of the data flow; last, for schemes with KV4 and KV8, the attention module: its
            queries, keys and values.
    """

    model: str
    scheme: str
    rotations: dict[str, Any] | None
    linears: dict[str, int]
    text: str
    seqlen: int
    blocks: int
    tokens: int
    tokenizer: str
    passes: int
    original: float
    everything: Effect
    layers: tuple[Part, ...]
    kinds: tuple[Part, ...]
    machine: dict[str, str]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def protocol(self) -> str:
        """One line that says how the values were measured."""
        return (
            f"{self.text}: {self.blocks} blocks of {self.seqlen} tokens ({self.tokens} tokens), tokenizer "
            f"{self.tokenizer}, float32 on {self.machine['device']}"
        )


def sensitivity(
    model: str | Path,
    scheme: str | Scheme | ModelScheme = "W4A16-g128",
    text: str = "wikitext2",
    seqlen: int | None = None,
    max_blocks: int = 32,
    device: str | torch.device = "auto",
    per_channel_fallback: bool = False,
    memory_gb: float = 8.0,
    rotate: Sequence[str] = (),
    seed: int = 2,
    progress: Progress | None = None,
) -> Sensitivity:
    """Round every part of a model to nearest alone, and all but it, and measure what that does.

    Takes some (layers + 2 x kinds + 2) forward passes over the text, in fp32. The result is the same for every
    `memory_gb`, up to the rounding of sums.

    Args:
        model: original model: local folder, or id on the Hugging Face hub.
        scheme: of the linears, see `sliderquant.schemes`.
        text: to measure on, see `sliderquant.calibration.text`.
        seqlen: tokens of a block; None: 2048, or the model's maximum when that is shorter.
        max_blocks: of the text, the first so many blocks are used.
        per_channel_fallback: linears whose input size the group does not divide get one scale per channel.
        memory_gb: of hidden states that are held at a time. What one block of text takes beyond it goes into files.
        rotate: rotations to fold into the model first, of `"R1"` to `"R4"`, see `sliderquant.rotations`. The original
            is then the rotated model.
        seed: of the signs of rotations.
        progress: is told how far the study is.

    Raises:
        InputError: something in the arguments or files is not usable; before any long work.
    """
    check_arguments(locals())
    progress = progress or Progress()
    target = resolve_device(device)
    if max_blocks < 1:
        raise InputError(f"max_blocks {max_blocks}: expected at least 1")
    if not memory_gb > 0:
        raise InputError(f"memory_gb {memory_gb}: expected more than 0")
    check_source(text)
    parsed = ModelScheme.parse(scheme)
    source = rotated(open_model(model), rotate, seed, parsed)
    plan = make_plan(
        source,
        Request(
            model,
            parsed,
            method_named("rtn"),
            samples=max_blocks,
            seqlen=seqlen,
            per_channel_fallback=per_channel_fallback,
        ),
    )
    length = plan.seqlen
    tokenizer = source.tokenizer()
    found = evaluation_blocks(text, tokenizer, length, vocabulary_of(source))
    for note in found.notes:
        progress.message(note)
    blocks = found.tokens[:max_blocks]
    decoder = Decoder(source, target)
    parts = _Parts(switched_kinds(plan), source.num_layers)
    study = Study(plan, decoder, blocks, parts.variants, memory_gb * 1e9, target)
    progress.message(
        f"{len(parts.variants) - 1} ways to quantize {source.name} to {plan.scheme}, {len(blocks)} blocks of {length} "
        f"tokens: {study.passes} passes through a layer, as many as {study.passes / source.num_layers:.1f} forward "
        f"passes take; times that the model is read: {study.reads}"
    )
    with torch.no_grad(), deterministic(target):
        measured = study.run(progress.layer_passed)
    original = measured[parts.original].perplexity
    everything = _effect(measured[parts.everything], original)
    shapes = source.shapes
    sizes = {name: shapes[f"{name}.weight"][0] for name in plan.schemes}

    def part(name: str, linears: Iterable[str], alone: Variant, all_but: Variant) -> Part:
        weights = sum(sizes[linear][0] * sizes[linear][1] for linear in linears)
        return Part(
            name, weights, _effect(measured[alone], original), _effect(measured[all_but], everything.perplexity)
        )

    return Sensitivity(
        model=source.name,
        scheme=str(plan.scheme),
        rotations=None if plan.rotations is None else plan.rotations.to_dict(),
        linears=dict(Counter(f"{name.split('.', 3)[-1]}: {scheme}" for name, scheme in plan.schemes.items())),
        text=text,
        seqlen=length,
        blocks=len(blocks),
        tokens=blocks.numel(),
        tokenizer=f"{type(tokenizer).__name__} of {len(tokenizer)} tokens",
        passes=study.passes,
        original=original,
        everything=everything,
        layers=tuple(part(str(layer.index), layer.full_linears, *parts.layer(layer.index)) for layer in source.layers),
        kinds=tuple(
            part(kind.rpartition(".")[2], [name for name in sizes if name.endswith(f".{kind}")], *parts.kind(kind))
            for kind in parts.kinds
        ),
        machine=machine(target),
        versions=versions(),
    )


def _effect(sums: Sums, reference: float) -> Effect:
    """`reference`: the perplexity to compare with."""
    return Effect(sums.perplexity, sums.perplexity - reference, sums.output_error, sums.kl_divergence)


@dataclass(frozen=True)
class _Parts:
    """The variants that a model of some layers with these kinds of linears in each is studied in."""

    kinds: tuple[str, ...]
    layers: int

    @property
    def original(self) -> Variant:
        return (frozenset(),) * self.layers

    @property
    def everything(self) -> Variant:
        return (frozenset(self.kinds),) * self.layers

    def layer(self, index: int) -> tuple[Variant, Variant]:
        """The layer alone, and all but it."""
        every, none = frozenset(self.kinds), frozenset[str]()
        alone = tuple(every if layer == index else none for layer in range(self.layers))
        return alone, tuple(every - quantized for quantized in alone)

    def kind(self, kind: str) -> tuple[Variant, Variant]:
        """The linears of this kind alone, and all but them."""
        only = frozenset([kind])
        return (only,) * self.layers, (frozenset(self.kinds) - only,) * self.layers

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All that differ from each other, the original first."""
        found = [self.original, self.everything]
        found += [variant for index in range(self.layers) for variant in self.layer(index)]
        found += [variant for kind in self.kinds for variant in self.kind(kind)]
        return tuple(dict.fromkeys(found))
