"""What a family of models calls its parts: data, one small file per family. `layer` puts it together layer by layer."""

from dataclasses import dataclass

__all__ = ["AttentionNames", "Family", "MlpNames"]


@dataclass(frozen=True)
class AttentionNames:
    """The attention of a decoder layer: its module, and the linears and norms inside it.

    Attributes:
        module: name in the decoder layer; all names but `norm` are names in the module.
        norm: the RMSNorm in the decoder layer that it reads; it multiplies by its weight as it is stored.
        query, key, value, output: linears; the last one is added to the residual stream.
        query_norm, key_norm: RMSNorms of each head of queries and keys; None: there are none.
    """

    module: str = "self_attn"
    norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None


@dataclass(frozen=True)
class MlpNames:
    """The gated MLP of a decoder layer: `down(activation(gate(x)) * up(x))`.

    Attributes:
        module: name in the decoder layer; all names but `norm` and `size` are names in the module.
        norm: the RMSNorm in the decoder layer that it reads; it multiplies by its weight as it is stored.
        gate, up, down: linears; the last one is added to the residual stream.
        size: the field of config.json with the number of channels between `up` and `down`.
    """

    module: str = "mlp"
    norm: str = "post_attention_layernorm"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    size: str = "intermediate_size"


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is quantized.

    Attributes:
        model_types: the `model_type`s of config.json that are built this way.
        architectures: the classes for causal language modelling, as config.json names them.
        base: module that maps token ids to the last hidden states.
        layers: list of decoder layers.
        attention, mlp: what is in each of them.
        embedding: token ids to the residual stream.
        final_norm: the RMSNorm that the head reads.
        head: the output projection, which stays in 16 bits.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    base: str = "model"
    layers: str = "model.layers"
    attention: AttentionNames = AttentionNames()
    mlp: MlpNames = MlpNames()
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
