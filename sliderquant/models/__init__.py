"""The supported families of models, and how their weights are found and read."""

from sliderquant.errors import InputError
from sliderquant.models.family import Family
from sliderquant.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3)


def family_of(model: str, model_type: str | None, architectures: list[str] | None) -> Family:
    """The family of a model, from its config.json.

    Raises:
        InputError: it is not a causal language model, or of an unsupported architecture.
    """
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    for family in FAMILIES:
        if architectures and any(name in family.architectures for name in architectures):
            return family
        if not architectures and model_type in family.model_types:
            return family
    named = ", ".join(architectures or []) or f"model_type {model_type!r}"
    if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
        raise InputError(f"{model}: {named} is not a causal language model; expected one of {supported}")
    raise InputError(f"{model}: {named} is not a supported architecture; expected one of {supported}")
