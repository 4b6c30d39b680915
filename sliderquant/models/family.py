"""What a family of models calls its parts: data, one small file per family."""

from dataclasses import dataclass

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is quantized.

    Attributes:
        model_types: the `model_type`s of config.json that are built this way.
        architectures: the classes for causal language modelling, as config.json names them.
        base: module that maps token ids to the last hidden states.
        layers: list of decoder layers.
        linears: the linear layers inside a decoder layer, in the order of the data flow.
        shared_inputs: those of them that multiply the same tensor, group by group; a group's linears are children of
            one module.
        norms: the RMSNorm inside a decoder layer that each of these groups reads, in the same order; it multiplies by
            its weight as it is stored.
        attention: the attention module inside a decoder layer.
        query, key, query_norm, key_norm: the linears that make queries and keys, and the RMSNorms of each head after
            them, or None.
        value, output, down: those of the linears that make the values, that read the attention's output, and that end
            the MLP; the last two are added to the residual stream.
        up: the one of them whose outputs, times those of an activation function, are the inputs of `down`.
        embedding: token ids to the residual stream.
        final_norm: the RMSNorm that the head reads.
        head: the output projection, which stays in 16 bits.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    base: str = "model"
    layers: str = "model.layers"
    linears: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    shared_inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
