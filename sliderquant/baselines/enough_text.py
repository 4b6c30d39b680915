"""Whether there is enough calibration text for what a method estimates from it."""

from sliderquant.planning.plan import Plan

__all__ = ["too_little_text"]

_TOKENS_PER_INPUT = 4
"""Measured: with one to three tokens for every input GPTQ is as good as rounding to nearest, and with fewer worse."""


def too_little_text(plan: Plan, tokens: int) -> str | None:
    """A warning when a method gets too little text; None: there is enough, or the method takes none.

    Args:
        tokens: places of the calibration text that the samples cover; one that several samples cover counts once.
    """
    if plan.method.engine == "rounding":
        return None
    inputs = max(plan.source.shapes[f"{name}.weight"][0][1] for name in plan.schemes)
    needed = _TOKENS_PER_INPUT * inputs
    if tokens >= needed:
        return None
    drawn = plan.samples * plan.seqlen
    overlapping = f" ({plan.samples} samples of {plan.seqlen}, which overlap)" if tokens < drawn else ""
    longer = "a longer text" if overlapping else "more --samples or a larger --seqlen"
    worse = ", and the model be worse than by rtn" if plan.method.name == "gptq" else ""
    return (
        f"warning: {tokens} tokens of calibration text{overlapping} are little for linears of up to {inputs} input "
        f"features: what {plan.method.name} finds may fit these tokens alone{worse}; use {needed} tokens "
        f"or more, by {longer}"
    )
