"""sliderquant generate: text from a quantized checkpoint, or from an original model to compare it with."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sliderquant.cli.errors import reported
from sliderquant.cli.options import DeviceOption, QuietOption, VerboseOption

__all__ = ["command"]


@reported
def command(
    model_name: Annotated[
        str, typer.Argument(metavar="OUT|MODEL", help="Quantized checkpoint, or original model: folder or hub id.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at the most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens up to this.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the model's chat template.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Generate text from PROMPT with a quantized or an original model."""
    import time

    import torch
    from transformers import TextStreamer

    from sliderquant.calibration.tokens import check_tokens
    from sliderquant.devices import resolve_device
    from sliderquant.errors import InputError
    from sliderquant.evaluation.models import is_quantized, load_original
    from sliderquant.loading import load
    from sliderquant.models.source import open_model, read_tokenizer

    if not prompt:
        raise InputError("PROMPT is empty: expected text to go on from")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError("PROMPT is not UTF-8 text: check the encoding of the terminal, or of the file it came from")
    folder = Path(model_name).expanduser()
    if is_quantized(folder):
        tokenizer = read_tokenizer(folder, model_name)
        model = load(folder, device=device, dtype=dtype)
    else:
        source = open_model(model_name)
        tokenizer = source.tokenizer()
        model = load_original(source, resolve_device(device), dtype)
    if tokenizer.chat_template and not raw:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("PROMPT: the tokenizer makes no tokens of it; expected text to go on from")
    check_tokens(inputs["input_ids"], model.get_input_embeddings().num_embeddings, tokenizer, "PROMPT")
    longest = model.config.max_position_embeddings
    if length >= longest:
        raise InputError(f"PROMPT has {length} tokens: expected fewer than {longest}, the longest that the model takes")
    if raw or not tokenizer.chat_template:
        print(prompt, end="", flush=True)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = model.generate(
        **inputs,
        max_new_tokens=min(max_new_tokens, longest - length),
        streamer=streamer,
        pad_token_id=pad,
        **sampling,
    )
    seconds = time.perf_counter() - start
    if not quiet:
        tokens = written.shape[1] - length
        if tokens == longest - length < max_new_tokens:
            print(f"stopped at {longest} tokens, the longest that the model takes", file=sys.stderr)
        print(f"{tokens} tokens, {tokens / seconds:.1f} a second on {model.device.type}", file=sys.stderr)
