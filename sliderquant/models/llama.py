"""Llama 1 to 3 and the families that share its decoder layer and the names in it."""

from sliderquant.models.family import AttentionNames, Family

__all__ = ["LLAMA", "MISTRAL", "QWEN2", "QWEN3"]

LLAMA = Family(model_types=("llama",), architectures=("LlamaForCausalLM",))
MISTRAL = Family(model_types=("mistral",), architectures=("MistralForCausalLM",))
QWEN2 = Family(model_types=("qwen2",), architectures=("Qwen2ForCausalLM",))
QWEN3 = Family(
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    attention=AttentionNames(query_norm="q_norm", key_norm="k_norm"),
)
