"""The hyper-parameters of the methods: the learned ones, and the one-shot ones, whose defaults are the published.

Every field of `Settings` can be set by name: `--set epochs=10 --set windows.shallow=2`, a YAML file, or `settings=`.
"""

from typing import Literal

from pydantic import Field, model_validator

from sliderquant.schemes import ModelScheme
from sliderquant.setting_errors import FrozenSettings

__all__ = [
    "AwqSettings",
    "GptqSettings",
    "LearningRates",
    "OneShotSettings",
    "ScaleSettings",
    "Settings",
    "SmoothQuantSettings",
    "WindowSettings",
]


class WindowSettings(FrozenSettings):
    """The inter-layer schedule, see `sliderquant.planning.windows.schedule`."""

    shallow: int = Field(4, ge=0, description="layers in the expanding ramp at the start")
    deep: int = Field(4, ge=0, description="layers in the contracting ramp at the end")
    size: int = Field(2, ge=1, description="layers in a middle window")
    stride: int = Field(1, ge=1, description="layers by which a middle window slides")

    @model_validator(mode="after")
    def _stride_within_size(self) -> "WindowSettings":
        if self.stride > self.size:
            raise ValueError(
                f"windows.stride={self.stride} would skip layers: it must not exceed windows.size={self.size}"
            )
        return self


class LearningRates(FrozenSettings):
    """AdamW's learning rates per sample of a batch; the rate used is this times the batch size."""

    weights: float = Field(2e-3, ge=0, description="of the offsets of weights, in quantization steps")
    low_rank: float = Field(5e-4, ge=0, description="of A and B")
    clipping: float = Field(1e-2, ge=0, description="of the clipping: of its logits, or of the logarithms of free ends")
    scales: float = Field(1e-3, ge=0, description="of the channel scales")
    activation_clipping: float = Field(
        1e-2, ge=0, description="of the logits of the clipping of activations, queries, keys and values"
    )


class ScaleSettings(FrozenSettings):
    """The channel scales, see `sliderquant.refine.scales`."""

    use: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: with schemes that quantize activations, or queries, keys and values"
    )
    start: Literal["ones", "statistics", "outliers"] = Field(
        "ones", description="1, or from calibration activations and weights: of every channel, or of outliers alone"
    )
    space: Literal["direct", "log"] = Field("direct", description="learn them, or their logarithms")

    def used_with(self, scheme: ModelScheme) -> bool:
        """Whether a model of this scheme has channel scales."""
        rounds = scheme.quantizes_activations or scheme.quantizes_attention
        return self.use == "always" or (self.use == "auto" and rounds)


class Settings(FrozenSettings):
    """The hyper-parameters of a learned method; the defaults are the published ones for weight-only schemes."""

    epochs: int = Field(60, ge=1, description="passes over the calibration samples per window, split over the stages")
    batch_size: int = Field(3, ge=1, description="samples per step")
    gamma: float = Field(0.5, ge=1e-3, le=1, description="share of input channels per intra-layer stage; 1: one stage")
    stage_order: Literal["sweep", "window"] = Field(
        "sweep", description="sweep: each stage slides over the whole model; window: all stages inside each window"
    )
    rank: int = Field(4, ge=0, description="rank of the low-rank term; 0: none")
    weights: bool = Field(False, description="learn an offset of every weight, counted in quantization steps")
    weights_decay: float = Field(
        0.0,
        ge=0,
        description="by exp(-x) offsets decay over a stage, however long: against fitting the calibration text alone",
    )
    hardening: bool = Field(
        False, description="keep more and more offsets as they are while a stage goes on, those nearest to codes first"
    )
    clipping: bool = Field(True, description="learn the clipping of every group's range")
    clipping_start: float | Literal["search"] = Field(
        4.0,
        description="clipping logits at the start, sigmoid(4) = 0.982; search: each group's best share of its range",
    )
    activation_clipping: Literal["auto", "always", "never"] = Field(
        "never",
        description="learn the clipping of the ranges of activations, queries, keys and values, where these are "
        "quantized; auto: where some of them have 4 bits, in checkpoints that sliderquant alone reads anyway",
    )
    activation_clipping_start: float = Field(4.0, description="its logits at the start, sigmoid(4) = 0.982")
    grid: Literal["range", "free"] = Field(
        "range", description="ends of a group's range: its current minimum and maximum, clipped; or free of the weights"
    )
    last_loss: Literal["hidden", "logits"] = Field(
        "hidden", description="what windows that end at the last layer match: its output, or the logits made of it"
    )
    relative_loss: float = Field(
        0.0,
        ge=0,
        le=1,
        description="squared errors of a token count by its mean square to the power -x: 0 as they are, 1 relatively",
    )
    windows: WindowSettings = WindowSettings()
    scales: ScaleSettings = ScaleSettings()
    learning_rates: LearningRates = LearningRates()
    matmul: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of matrix products while learning; auto: bfloat16 where the device has units for it, on a "
        "CPU from a hidden size of 512 on",
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="compile the quantizers; auto: on a CPU, where the run is long enough to gain by it"
    )
    retries: int = Field(
        4, ge=0, description="restarts of a window after a non-finite loss, the rates halved each time"
    )
    stream_memory_gb: float = Field(8.0, gt=0, description="activations beyond this are kept in files, not in memory")

    @model_validator(mode="after")
    def _what_starts_is_learned(self) -> "Settings":
        if self.grid == "free" and not self.clipping:
            raise ValueError("grid=free learns the ends of the ranges by their clipping: it needs clipping=true")
        if self.hardening and not self.weights:
            raise ValueError("hardening=true keeps offsets of weights as they are: it needs weights=true")
        return self

    def clips_activations(self, scheme: ModelScheme, rotates_online: bool) -> bool:
        """Whether a model of this scheme has learned clippings of activations, queries, keys and values.

        Args:
            rotates_online: the model computes rotations while it runs.
        """
        fewest = min(scheme.linear.activation_bits, scheme.kv_bits)
        if self.activation_clipping == "auto":
            return fewest <= 4 and (scheme.quantizes_attention or rotates_online)
        return self.activation_clipping == "always" and fewest <= 8

    @property
    def stages(self) -> tuple[float, ...]:
        """The shares of the input channels that are quantized in each stage, ascending to 1."""
        count = max(round(1 / self.gamma), 1)
        return tuple((i + 1) / count for i in range(count))

    def epochs_of_stage(self, stage: int) -> int:
        """The epochs split evenly over the stages; the later ones get what does not divide."""
        count = len(self.stages)
        return self.epochs // count + (stage >= count - self.epochs % count)


class OneShotSettings(FrozenSettings):
    """What all methods share that look at calibration activations once, layer by layer."""

    batch_size: int = Field(4, ge=1, description="samples that pass through a layer at a time")
    stream_memory_gb: float = Field(8.0, gt=0, description="activations beyond this are kept in files, not in memory")


class GptqSettings(OneShotSettings):
    """See `sliderquant.baselines.gptq`."""

    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, a share of its mean")
    act_order: bool = Field(
        True, description="columns in descending order of the Hessian's diagonal, on grids of the original weights"
    )


class AwqSettings(OneShotSettings):
    """See `sliderquant.baselines.awq`."""

    ratios: int = Field(20, ge=1, description="exponents tried for the channel scales: 0, 1/n, ..., (n-1)/n")
    clipping: bool = Field(True, description="search the clipping of every group's range too")
    clip_steps: int = Field(20, ge=1, description="steps that a whole range would take")
    clip_at_most: float = Field(0.5, ge=0, lt=1, description="largest share of a range that may be clipped")


class SmoothQuantSettings(OneShotSettings):
    """See `sliderquant.baselines.smoothquant`."""

    ratio: float = Field(0.5, ge=0, le=1, description="share of the difficulty that moves from activations to weights")
