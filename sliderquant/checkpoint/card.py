"""The model card: README.md of a checkpoint."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import jinja2
import torch
from huggingface_hub import ModelCardData

from sliderquant._version import __version__
from sliderquant.checkpoint.config import Entry
from sliderquant.checkpoint.readers import Verdict, readers
from sliderquant.schemes import Scheme

__all__ = ["CardInfo", "render_card"]

_NOTHING = Entry()


@dataclass(frozen=True)
class CardInfo:
    """What the model card says beyond what the checkpoint itself shows.

    Attributes:
        title: heading; empty: made of the base model and the scheme.
        base_model: hub id of the model that was quantized; None or a local path: not named.
        license: as the hub names it (`apache-2.0`, `llama3`, ...): that of the base model.
        method: name of the quantization method, and its effort.
        calibration: text that it was calibrated on, and how much of it; empty: none.
        command: command line that makes this checkpoint again.
        perplexity: by name of the text, that of the original model (None: not measured) and that of this one.
    """

    title: str = ""
    base_model: str | None = None
    license: str | None = None
    method: str = ""
    calibration: str = ""
    command: str = ""
    perplexity: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)


def render_card(
    info: CardInfo,
    schemes: Mapping[str, Scheme],
    total_bytes: int,
    entry: Entry = _NOTHING,
    average_bits: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    chat: bool = False,
) -> str:
    """The text of README.md.

    Args:
        schemes: by name of the linear.
        total_bytes: of all tensors.
        entry: what the model does while it runs.
        average_bits: of the code of a quantized weight; named where linears differ in bits.
        dtype: of the model.
        chat: its tokenizer has a chat template.
    """
    counts = Counter(str(scheme) for scheme in schemes.values())
    # A path of the machine that quantized the model means nothing to whoever reads the card.
    hub_id = info.base_model if info.base_model and re.fullmatch(r"[\w.-]+/[\w.-]+", info.base_model) else None
    asymmetric = any(not scheme.symmetric for scheme in schemes.values())
    found = readers(schemes.values(), entry, dtype)
    verdicts = {reader.name: [other.verdict for other in found if other.name == reader.name] for reader in found}
    rotations, kv_bits, clipped = entry
    online = () if rotations is None else rotations.online
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="quantized" if hub_id else None,
        license=info.license,
        library_name="sliderquant",
        pipeline_tag="text-generation",
        tags=[*([] if entry.own else ["compressed-tensors"]), "quantized", "sliderquant"],
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sliderquant.checkpoint", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown
        keep_trailing_newline=True,
    )
    named = hub_id.split("/")[1] if hub_id else "Quantized model"
    return environment.get_template("card.md.jinja").render(
        front_matter=f"---\n{data.to_yaml()}\n---",
        title=info.title or f"{named} {' + '.join(counts)}",
        base_model=hub_id,
        schemes=list(counts),
        counts=list(counts.items()),
        average_bits=average_bits if len({scheme.bits for scheme in schemes.values()}) > 1 else None,
        bits=[scheme.bits for scheme in schemes.values()],
        version=__version__,
        method=info.method,
        calibration=info.calibration,
        chat=chat,
        command=info.command,
        total_bytes=total_bytes,
        results=[
            (name, "-" if original is None else f"{original:.3f}", f"{quantized:.3f}")
            for name, (original, quantized) in info.perplexity.items()
        ],
        rotations=[] if rotations is None else list(rotations.transforms),
        online=online,
        kv_bits=kv_bits,
        clipped=clipped,
        own=entry.own,
        asymmetric=asymmetric,
        activations=sorted({scheme.activations for scheme in schemes.values() if scheme.quantizes_activations}),
        readers=found,
        stored_formats=sorted({scheme.stored_format for scheme in schemes.values()}),
        vllm_runs=Verdict.RUNS in verdicts["vLLM"],
        transformers_reads=not {Verdict.MISREADS, Verdict.REFUSES} & set(verdicts["transformers"]),
    )
