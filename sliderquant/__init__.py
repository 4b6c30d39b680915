"""SliderQuant: quantize a language model to 2, 3, 4 or 8 bits, and run it.

result = sliderquant.quantize("meta-llama/Llama-3.1-8B", "llama-w4", scheme="W4A16-g128")
model = sliderquant.load("llama-w4")
"""

from typing import TYPE_CHECKING, Any

from sliderquant._version import __version__

if TYPE_CHECKING:
    from sliderquant.evaluation.bench import bench
    from sliderquant.evaluation.models import evaluate
    from sliderquant.loading import load
    from sliderquant.pipeline import plan, quantize
    from sliderquant.warming import warm_up

__all__ = ["__version__", "bench", "evaluate", "load", "plan", "quantize", "warm_up"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only when something is used, so that `--help` is quick.
    if name == "load":
        from sliderquant.loading import load

        return load
    if name == "bench":
        from sliderquant.evaluation.bench import bench

        return bench
    if name == "evaluate":
        from sliderquant.evaluation.models import evaluate

        return evaluate
    if name == "warm_up":
        from sliderquant.warming import warm_up

        return warm_up
    if name in ("plan", "quantize"):
        from sliderquant import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
