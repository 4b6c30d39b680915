"""A model's parts, put together one decoder layer at a time: the whole model is never in memory."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sliderquant.models.matching import empty_model
from sliderquant.models.source import ModelSource

__all__ = ["Decoder", "LayerInputs"]


@dataclass(frozen=True)
class LayerInputs:
    """What enters the decoder layers besides hidden states: keyword arguments for each layer, for a batch of 1, that
    broadcast over a batch (positions, rotary embeddings, attention mask)."""

    arguments: tuple[dict[str, Any], ...]


class _AllRecorded(Exception):
    """Ends a forward pass after the last recorder: what comes after the layers is not in memory."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, and passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.last = False
        # Models pick a mask for each layer by such attributes of the layer (full or sliding attention).
        for name in ("attention_type", "layer_type", "is_causal", "layer_idx"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        if self.last:
            raise _AllRecorded
        return hidden_states


class Decoder:
    """The model of `source` on the meta device; its layers are made real one at a time, in fp32."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self.model = empty_model(source.name, source.config)
        self.model.eval()
        self.layers: nn.ModuleList = self.model.get_submodule(source.family.layers)

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, fp32, on the device."""
        name = f"{self.source.family.layers}.{index}"
        return self._loaded(name, name)

    def output(self) -> tuple[nn.Module, nn.Module]:
        """What comes after the last layer, fp32, on the device: the norm, and the head that makes logits of what the
        norm puts out."""
        family = self.source.family
        tied = self.source.config.tie_word_embeddings
        norm = self._loaded(family.final_norm, family.final_norm)
        return norm, self._loaded(family.head, family.embedding if tied else family.head)

    def _loaded(self, name: str, stored: str) -> nn.Module:
        module = copy.deepcopy(self.model.get_submodule(name))
        weights = {part: self.source.weight(f"{stored}.{part}", self.device) for part in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        return module.requires_grad_(False).to(self.device)

    @torch.no_grad()
    def embed(self, blocks: Tensor) -> tuple[Iterator[Tensor], LayerInputs]:
        """Run what comes before the first layer.

        Args:
            blocks: token ids int64 `[samples, seqlen]`.

        Returns:
            the hidden states fp32 `[1, seqlen, hidden]` of each sample in turn, and what else the layers are given.
        """
        base = self.model.get_submodule(self.source.family.base)
        embedding: nn.Module = copy.deepcopy(base.get_input_embeddings())
        name = f"{self.source.family.base}.{self._embedding_name(base)}.weight"
        embedding.weight = nn.Parameter(self.source.weight(name, self.device), requires_grad=False)
        recorders = [_Recorder(layer) for layer in self.layers]
        recorders[-1].last = True
        parent_name, _, attribute = self.source.family.layers.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        setattr(parent, attribute, nn.ModuleList(recorders))
        try:
            base(inputs_embeds=embedding(blocks[:1].to(self.device)), use_cache=False)
        except _AllRecorded:
            pass
        finally:
            setattr(parent, attribute, self.layers)
        inputs = LayerInputs(tuple(recorder.arguments for recorder in recorders))
        return (embedding(row[None].to(self.device)) for row in blocks), inputs

    @staticmethod
    def _embedding_name(base: nn.Module) -> str:
        embedding = base.get_input_embeddings()  # type: ignore[operator]
        return next(name for name, module in base.named_modules() if module is embedding)
