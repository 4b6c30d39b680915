"""The supported families of models, and how their weights are found and read."""

from collections.abc import Mapping
from typing import Any

from sliderquant.errors import InputError
from sliderquant.models.family import Family
from sliderquant.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3

__all__ = ["FAMILIES", "Family", "check_model_type", "family_of", "family_of_class"]

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


def family_of_class(model: object) -> Family | None:
    """The family of a model that is loaded, by its class; None: it is of none."""
    return next((family for family in FAMILIES if type(model).__name__ in family.architectures), None)


def check_model_type(model: str, config: Mapping[str, Any]) -> None:
    """The `model_type` of a config.json decides what transformers builds, whatever `architectures` says.

    Raises:
        InputError: it is not one of a supported family, whose code is in transformers.
    """
    types = [name for family in FAMILIES for name in family.model_types]
    if config.get("model_type") in types:
        return
    own = ", and the model's own code (auto_map) is never run" if config.get("auto_map") else ""
    raise InputError(
        f"{model}: config.json has model_type {config.get('model_type')!r}{own}; expected one of {', '.join(types)}"
    )
