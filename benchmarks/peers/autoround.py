"""AutoRound (package auto-round) as a peer: run by its own interpreter, see peer_worker.py next to this file."""

import peer_worker
from auto_round import AutoRound
from torch import Tensor


def quantize(task: peer_worker.Task, tokens: Tensor) -> peer_worker.Quantized:
    tuner = AutoRound(
        str(task.model),
        bits=task.bits,
        group_size=task.group_size,
        sym=False,
        dataset=[sample[None] for sample in tokens],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        seed=task.seed,
        **task.options,
    )
    model, _ = tuner.quantize()
    tuned = tuner.quantize_config
    settings = {
        name: getattr(tuned, name)
        for name in ("iters", "lr", "minmax_lr", "momentum", "enable_minmax_tuning", "enable_quanted_input")
    }
    settings |= {
        "batch_size": tuner.calibration_context.batch_size,
        "dtype": str(tuner.model_context.amp_dtype),
        "enable_torch_compile": tuner.compress_context.enable_torch_compile,
    }
    return peer_worker.Quantized(model, settings)


if __name__ == "__main__":
    peer_worker.main(quantize)
