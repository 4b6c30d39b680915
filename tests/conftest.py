"""What tests share: small random models that are made here, and the folder with larger material, where there is one."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
# Triton decides between interpreter and compiler when it is first imported, by whatever test comes first: this file is
# read before all of them. On a machine with a GPU the kernels run there instead.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "sliderquant" / "assets" / "demo-llama-5m"
SHARED = ROOT.parent / "shared"

# The benchmarks are not installed with the package. Last, because the folder `kernels` next to them must not be taken
# for the package of that name.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: with more threads, most of the time goes into waking them."""
    torch.set_num_threads(1)


@pytest.fixture
def compiler(caplog: pytest.LogCaptureFixture) -> None:
    """Skips where nothing compiles; what does has to compute the same bits."""
    from sliderquant.refine.compiling import can_compile  # not before Triton has decided

    if not can_compile("cpu", torch.bfloat16):
        caplog.clear()
        can_compile.__wrapped__("cpu", torch.bfloat16)
        (reason,) = [record.getMessage() for record in caplog.records if record.name == can_compile.__module__]
        assert "does not compute the same bits" not in reason
        pytest.skip(reason)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO_MODEL


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the texts and models that do not belong into the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the folder {SHARED} with data/ and models/, which is not part of the project")
    return SHARED


def save_random_model(
    folder: Path, dtype: str = "bfloat16", seed: int = 0, model_type: str = "llama", **changes: object
) -> Path:
    """A tiny random causal language model of a family, saved as a user would have it, with the demo's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 2048,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0, 0.08)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Path]:
    """`random_model(folder, **configuration)`, see `save_random_model`."""
    return save_random_model


@pytest.fixture(scope="session")
def any_size_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`any_size_model(draw, channels_per_query, **configuration)`: a random fp32 model of sizes that hypothesis draws.
    Of the hidden size, which need not be that of all heads, each query head has `channels_per_query`: a strategy."""

    def made(draw: Callable[..., Any], channels_per_query: Any, **configuration: object) -> Path:
        values = draw(st.integers(1, 3), label="key and value heads")
        heads = values * draw(st.integers(1, 4), label="queries for each")
        return save_random_model(
            tmp_path_factory.mktemp("sizes") / "model",
            dtype="float32",
            hidden_size=heads * draw(channels_per_query, label="channels per query head"),
            intermediate_size=draw(st.sampled_from([24, 28, 40, 44, 72, 86, 96, 172]), label="intermediate size"),
            head_dim=draw(st.sampled_from([8, 12, 16, 20]), label="head_dim"),
            num_attention_heads=heads,
            num_key_value_heads=values,
            vocab_size=64,
            **configuration,
        )

    return made


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped-query attention, tied embeddings, bf16."""
    return save_random_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand tokens of running text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (
        f"Item {i} of the list holds {i * 37 % 101} apples and {i * 53 % 89} pears; return it." for i in range(400)
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _round_tokens(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """x `[..., in]`, each token rounded to its own grid, which holds 0: in fp32; the product with the scale exactly."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = x.float().amin(-1, keepdim=True).clamp(max=0), x.float().amax(-1, keepdim=True).clamp(min=0)
    span = 2 * torch.maximum(-least, most) if symmetric else most - least
    scale = span / (high - low)
    scale[scale == 0] = 1
    zero = torch.zeros_like(scale) if symmetric else torch.round(low - least / scale).clamp(low, high)
    return (((x.float() / scale).round() + zero).clamp(low, high) - zero).double() * scale.double()


@pytest.fixture(scope="session")
def round_tokens() -> Callable[[torch.Tensor, int, bool], torch.Tensor]:
    """`round_tokens(x, bits, symmetric)`: dynamic quantization of activations, simulated. fp64 of the shape of x."""
    return _round_tokens
