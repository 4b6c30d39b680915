"""Models with activation outliers, made from any other: what low-bit activations have to survive."""

from typing import Any

import torch
from torch import nn

from sliderquant.models.family import Family
from sliderquant.models.layer import model_layers

__all__ = ["inject_outliers"]


@torch.no_grad()
def inject_outliers(model: Any, family: Family, channels: int = 4, factor: float = 32.0, seed: int = 0) -> None:
    """Multiply a few channels of every norm's weight by `factor` and divide the columns that read them, in place.

    The model computes what it did before, exactly where `factor` is a power of two; but every linear that reads a norm
    has inputs with `channels` outliers, so that one scale per token leaves the others almost no levels. A tied head
    becomes a tensor of its own, because its columns are divided and the embedding's are not.

    Args:
        model: a transformers causal language model of `family`.
        channels: how many, drawn anew for each norm.
        factor: 30 to 60 is what large language models show.
        seed: of the choice of channels.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.get_submodule(family.head)
    if model.config.tie_word_embeddings:
        head.weight = nn.Parameter(head.weight.clone())
        model.config.tie_word_embeddings = False
    read_by = [(model.get_submodule(family.final_norm), [head])]
    for layer, module in model_layers(model, family):
        for norm, linears in layer.normed_groups:
            read_by.append((module.get_submodule(norm), [module.get_submodule(name) for name in linears]))
    for norm, linears in read_by:
        chosen = torch.randperm(len(norm.weight), generator=generator)[:channels].to(norm.weight.device)
        norm.weight[chosen] *= factor
        for linear in linears:
            linear.weight[:, chosen] /= factor
