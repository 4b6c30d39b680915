"""GPTQ of LLM Compressor (package llmcompressor) as a peer: run by its own interpreter, see peer_worker.py."""

import peer_worker
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM


def quantize(task: peer_worker.Task, tokens: torch.Tensor) -> peer_worker.Quantized:
    groups = {"strategy": "channel"} if task.group_size < 0 else {"strategy": "group", "group_size": task.group_size}
    weights = QuantizationArgs(num_bits=task.bits, type="int", symmetric=False, **groups)
    gptq = GPTQModifier(
        config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    samples = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    quantized = oneshot(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype="auto"),
        recipe=gptq,
        dataset=Dataset.from_dict(samples),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    # The one that it returns holds scales beside the weights, and would be saved packed.
    plain = AutoModelForCausalLM.from_pretrained(task.model, dtype=quantized.dtype)
    names = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in quantized.state_dict().items() if name in names})
    settings = {
        "block_size": gptq.block_size,
        "dampening_frac": gptq.dampening_frac,
        "actorder": str(gptq.actorder),
        "observer": weights.observer,
        "dtype": str(quantized.dtype),
    }
    return peer_worker.Quantized(plain, settings)


if __name__ == "__main__":
    peer_worker.main(quantize)
