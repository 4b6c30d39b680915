"""Tokens through `generate`, as a user has them: a model of Llama-3-8B's shape at W4A16-g128 beside the same in bf16.

Both are made on the GPU from random numbers, since time depends on shapes alone, and take turns. The original is timed
as transformers runs it and with our graphs too, which is a harder rival. Loading from a folder is not in it;
`sliderquant bench` measures that.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import random_model
from sliderquant.decoding import DecodeRunner, attach_decode_runner
from sliderquant.evaluation.bench_worker import generate_timed, weight_bytes
from sliderquant.loading import make_fast
from sliderquant.schemes import Scheme
from sliderquant.warming import warm_up

from .context import Context

__all__ = ["run"]

SCHEME = "W4A16-g128"
BATCHES = (1, 16)
PROMPT, NEW_TOKENS, REHEARSED_TOKENS, ROUNDS = 16, 48, 4, 5
# Without graphs a token takes as long for any model of so many layers: fewer of them tell it.
FEW_TOKENS = 12
# Of both models of that shape, with what they compute.
EIGHT_BILLION_BYTES = 26e9
# What a round of all takes at most on a GPU, with some to spare.
ROUND_SECONDS = 6.0


def run(context: Context) -> None:
    """Add a row for each batch and way, round by round; a round that is kept is not measured again."""
    shape = "tiny" if context.rehearsal else shape_that_fits(torch.cuda.mem_get_info(context.device)[0])
    models = {
        "quantized": random_model.build(shape, context.device, Scheme.parse(SCHEME)),
        "original": random_model.build(shape, context.device),
    }
    make_fast(models["quantized"])
    attach_decode_runner(models["original"])
    # Tokens of a step, of the prompts of both batches.
    found = warm_up(models["quantized"], tokens=(1, PROMPT, PROMPT * BATCHES[-1]), batches=BATCHES)
    print(f"warm_up: {found.kernels} kernels in {found.seconds:.1f} s {found.errors}", flush=True)
    sizes = {name: weight_bytes(model) for name, model in models.items()}
    context.add("models", {"shape": shape, "scheme": SCHEME, "weight_bytes": sizes})
    for batch in (1, 2) if context.rehearsal else BATCHES:
        for turn in range(1 if context.rehearsal else ROUNDS + 1):
            key = f"batch {batch} round {turn}"
            if context.has(key):
                continue
            context.need(ROUND_SECONDS)
            found = {}
            for name, model in models.items():
                for graphs in (True, False):
                    tokens = REHEARSED_TOKENS if context.rehearsal else NEW_TOKENS if graphs else FEW_TOKENS
                    way = f"{name}, {'graphs' if graphs else 'no graphs'}"
                    found[way] = ms_per_token(model, batch, tokens, graphs)
            # The first round compiles and captures.
            context.add(key, {"batch": batch, "turn": turn, "warm": turn > 0, "ms": found})
            print(key, {way: round(ms, 3) for way, ms in found.items()}, flush=True)
        for name, model in models.items():
            key = f"batch {batch} graph of {name}"
            if not context.has(key) and not context.rehearsal:
                try:
                    context.add(key, {"batch": batch, "ms": graph_ms(model, batch)})
                except LookupError as error:
                    context.add(key, {"batch": batch, "error": str(error)})


def shape_that_fits(free: float) -> str:
    """The larger shape, if both its models fit into so many bytes."""
    return "llama-3-8b" if free >= EIGHT_BILLION_BYTES else "1b"


def ms_per_token(model: Any, batch: int, tokens: int, graphs: bool) -> float:
    """Milliseconds from one token to the next in `generate`: of each sequence, not of all together."""
    model.generation_config.disable_compile = not graphs
    try:
        _, times = generate_timed(model, batch, PROMPT, tokens)
    finally:
        model.generation_config.disable_compile = False
    return 1e3 * (times[-1] - times[0]) / (len(times) - 1)


def graph_ms(model: Any, batch: int, repeats: int = 20) -> float:
    """Milliseconds of a step's graph alone, median of single replays. Raises LookupError: there is none."""
    runner = getattr(model.get_compiled_call, "__self__", None)
    slots = [slot for slot in runner.slots if slot.batch == batch] if isinstance(runner, DecodeRunner) else []
    slot, graph = next(((slot, graph) for slot in slots for graph in slot.graphs.values()), (None, None))
    if slot is None or graph is None:
        raise LookupError("generate captured none, so what is called `graphs` ran without; the log says why")
    slot.index.fill_(PROMPT)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)
