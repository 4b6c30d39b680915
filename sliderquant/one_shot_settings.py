"""The hyper-parameters of the one-shot methods; the defaults are the published ones."""

from pydantic import Field

from sliderquant.setting_errors import FrozenSettings

__all__ = ["AwqSettings", "GptqSettings", "OneShotSettings", "SmoothQuantSettings"]


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
