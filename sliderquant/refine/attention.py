"""The rounding of queries, keys and values while a layer is learned: with gradients, and with learned clipping."""

import torch
from torch import Tensor, nn

from sliderquant.checkpoint.clips import ATTENTION_SITES, Clip
from sliderquant.modules.attention import AttentionRounding
from sliderquant.modules.rotated import OnlineRotation
from sliderquant.quantizer.fake_quantize import fake_quantize_activations
from sliderquant.refine.activation_clipping import ActivationClipping

__all__ = ["LearnedRounding", "learn_rounding"]


class LearnedRounding(AttentionRounding):
    """Rounds as an `AttentionRounding` does where nothing needs gradients, and elsewhere passes them straight through.

    Attributes:
        compiled: whether rounding with gradients is, see `compiling.can_compile`.
        learned_clips: by site, the factors on the ends of ranges; empty: they are not clipped.
    """

    def __init__(self, rounding: AttentionRounding, compiled: bool, clip_start: float | None) -> None:
        """
        Args:
            rounding: whose place it takes.
            clip_start: where the factors start, before the sigmoid; None: they are not clipped.
        """
        super().__init__(rounding.bits, rounding.rotation, rounding._config, rounding._eager, rounding.cache_keyword)
        self.compiled = compiled
        self.learned_clips = nn.ModuleDict()
        if clip_start is not None:
            self.learned_clips.update({site: ActivationClipping(clip_start) for site in ATTENTION_SITES})

    def _round(self, rows: Tensor, rotation: OnlineRotation | None, site: str) -> Tensor:
        if not (torch.is_grad_enabled() and (rows.requires_grad or self.learned_clips)):
            return super()._round(rows, rotation, site)
        rows = rows if rotation is None else rotation(rows)
        factors = self.learned_clips[site]() if self.learned_clips else None
        return fake_quantize_activations(rows, self.bits, False, self.compiled, factors)

    def clip(self, site: str) -> Clip | None:
        if not self.learned_clips:
            return None
        low, high = self.learned_clips[site].stored().tolist()  # type: ignore[operator]
        return low, high


def learn_rounding(attention: nn.Module, compiled: bool, clip_start: float | None) -> None:
    """Let an attention module that rounds what it multiplies do so with gradients, in place; see `LearnedRounding`."""
    rounding: AttentionRounding = attention.rounding  # type: ignore[assignment]
    attention.rounding = LearnedRounding(rounding, compiled, clip_start)
