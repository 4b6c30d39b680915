"""Merged linears in whole models of every family: against the same models with single ones."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from sliderquant.checkpoint import CheckpointWriter, read_checkpoint
from sliderquant.loading import load
from sliderquant.models import FAMILIES
from sliderquant.models.layer import model_layers
from sliderquant.modules import (
    LinearSlice,
    MergedLinear,
    PackedLinear,
    QuantizedLinear,
    cache_keyword,
    merge_linears,
    split_linears,
)
from sliderquant.quantizer.grids import dequantize, round_to_nearest
from sliderquant.schemes import Scheme

FAMILY_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


def quantized_model(
    folder: Path, model_type: str, random_model: Callable[..., Path], scheme_of: Callable[[str], str]
) -> Path:
    """A tiny model of a family, rounded and written as a checkpoint."""
    source = random_model(folder / "source", model_type=model_type)
    with CheckpointWriter(folder / "out") as writer:
        for key, tensor in load_file(source / "model.safetensors").items():
            if key.endswith("proj.weight"):
                name = key.removesuffix(".weight")
                scheme = Scheme.parse(scheme_of(name))
                quantized = round_to_nearest(tensor.float(), scheme, tensor.dtype)
                writer.add_quantized(name, quantized, scheme, dequantize(quantized, scheme))
            else:
                writer.add_tensor(key, tensor)
        writer.finish(AutoConfig.from_pretrained(source), source)
    return folder / "out"


MODELS = [(model_type, "W4A16-g32") for model_type in FAMILY_TYPES]
MODELS += [("qwen2", "W4A4"), ("llama", "W4A8-g32-sym-act-sym")]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Path]
) -> Path:
    model_type, scheme = request.param
    return quantized_model(tmp_path_factory.mktemp(model_type), model_type, random_model, lambda _: scheme)


IDS = torch.arange(2 * 11).view(2, 11) * 7 % 2000


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def merged_count(model: nn.Module) -> int:
    return sum(isinstance(module, MergedLinear) for module in model.modules())


def launches(model: nn.Module, run: Callable[[], Any]) -> int:
    """Products of packed weights in a forward."""
    counted: list[int] = []
    modules = [module for module in model.modules() if isinstance(module, PackedLinear)]
    handles = [module.register_forward_hook(lambda *_: counted.append(1)) for module in modules]
    run()
    for handle in handles:
        handle.remove()
    return len(counted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_logits(checkpoint: Path, dtype: str) -> None:
    single, merged = load(checkpoint, "cpu", dtype, merge=False), load(checkpoint, "cpu", dtype)
    assert (merged_count(single), merged_count(merged)) == (0, 4)
    for ids in (IDS, IDS[:1, :1], IDS.repeat(4, 2)):
        assert torch.equal(merged(ids).logits, single(ids).logits)
    assert launches(merged, lambda: merged(IDS)) == 2 * 4
    assert launches(single, lambda: single(IDS)) == 2 * 7
    for model in (merged, single):
        linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
        assert sum(name.endswith("_proj") for name in linears) == 14


def test_generate(checkpoint: Path) -> None:
    single, merged = load(checkpoint, "cpu", merge=False), load(checkpoint, "cpu")
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for keywords in ({}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}):
        arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1} | keywords
        assert torch.equal(merged.generate(IDS, **arguments), single.generate(IDS, **arguments))


def test_generation_in_two_threads(checkpoint: Path) -> None:
    model = load(checkpoint, "cpu")
    prompts = [IDS[:1], IDS[1:, :7]]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    expected = [model.generate(prompt, **arguments) for prompt in prompts]
    got: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i: got.update({i: model.generate(prompts[i], **arguments)}), args=(i,))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(2))


def test_saving_writes_the_tensors_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, "cpu")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    assert read_checkpoint(tmp_path / "again").schemes == read_checkpoint(checkpoint).schemes
    assert torch.equal(load(tmp_path / "again", "cpu")(IDS).logits, model(IDS).logits)


def test_load_state_dict(checkpoint: Path) -> None:
    single, merged = load(checkpoint, "cpu", merge=False), load(checkpoint, "cpu")
    for key, value in single.state_dict().items():
        if key.endswith(("weight_scale", "bias")):
            value.mul_(1.5)
    changed = {key: value.clone() for key, value in single.state_dict().items()}
    for key in changed:
        if key.endswith("weight_scale"):
            changed[key] *= 1.25
    expected = merged(IDS).logits
    for model in (single, merged):
        assert not any(model.load_state_dict(changed))
    assert torch.equal(merged(IDS).logits, single(IDS).logits)
    assert not torch.equal(merged(IDS).logits, expected)


def test_split_and_merge_again(checkpoint: Path) -> None:
    model = load(checkpoint, "cpu")
    expected, state = model(IDS).logits, model.state_dict()
    split_linears(model)
    assert not any(isinstance(module, (LinearSlice, MergedLinear)) for module in model.modules())
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooked == ["lm_head"]
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    assert torch.equal(model(IDS).logits, expected)
    storages = [t.untyped_storage().data_ptr() for name, t in model.named_buffers() if "packed" in name]
    assert len(storages) == len(set(storages))
    merge_linears(model)
    merge_linears(model)
    assert merged_count(model) == 4
    assert torch.equal(model(IDS).logits, expected)
    assert launches(model, lambda: model(IDS)) == 2 * 4
    again = model.state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_one_linear_of_another_scheme(tmp_path: Path, random_model: Callable[..., Path]) -> None:
    """As after --per-channel-fallback: its group stays single, the rest is merged."""
    odd = "model.layers.1.self_attn.k_proj"
    path = quantized_model(tmp_path, "qwen2", random_model, lambda name: "W4A16" if name == odd else "W4A16-g32")
    single, merged = load(path, "cpu", merge=False), load(path, "cpu")
    assert merged_count(merged) == 3
    assert type(merged.model.layers[1].self_attn.q_proj) is PackedLinear
    assert torch.equal(merged(IDS).logits, single(IDS).logits)
    before, after = load_file(path / "model.safetensors"), merged.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    merge_linears(single)
    assert merged_count(single) == 3


def test_copies_and_casts_of_a_model(checkpoint: Path) -> None:
    model, single = load(checkpoint, "cpu", "float32"), load(checkpoint, "cpu", "float32", merge=False)
    expected = model(IDS).logits
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(other(IDS).logits, single.to(torch.bfloat16)(IDS).logits)
    assert launches(other, lambda: other(IDS)) == 2 * 4
    assert torch.equal(model(IDS).logits, expected)


def test_compiled_decoding_with_a_static_cache(checkpoint: Path, programs: Any) -> None:
    """Programs are not made anew for every token, and have four products a layer."""

    def decode(merge: bool) -> tuple[list[int], list[torch.Tensor]]:
        model, traced = load(checkpoint, "cpu", merge=merge), programs()
        cache = StaticCache(config=model.config, max_cache_len=32)
        cached = {cache_keyword(model.forward): cache}
        model(input_ids=IDS, **cached)
        compiled = torch.compile(model.forward, fullgraph=True, backend=traced)
        tokens = [IDS[:, token : token + 1] for token in range(8)]
        return traced.products, [compiled(input_ids=ids, **cached).logits for ids in tokens]

    products, logits = decode(merge=True)
    single_products, expected = decode(merge=False)
    assert all(torch.equal(one, other) for one, other in zip(logits, expected, strict=True))
    assert set(products) == {2 * 4}
    assert set(single_products) == {2 * 7}
    # One program; two for a sliding window, whose cache is another one from its second token on.
    assert len(products) == len(single_products) <= 2


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_linears_that_share_an_input(family: Any, random_model: Callable[..., Path], tmp_path: Path) -> None:
    """The family's data against the model's own code: the same tensor reaches every linear of a group, and no other."""
    folder = random_model(tmp_path / "model", model_type=family.model_types[0])
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, int] = {}
    kept: list[torch.Tensor] = []
    (spec, layer), *_ = model_layers(model, family)
    for name in spec.linears:

        def record(module: nn.Module, arguments: Any, name: str = name) -> None:
            kept.append(arguments[0])
            seen[name] = id(arguments[0])

        layer.get_submodule(name).register_forward_pre_hook(record)
    model(IDS)
    groups: dict[int, list[str]] = {}
    for name in spec.linears:
        groups.setdefault(seen[name], []).append(name)
    assert [tuple(names) for names in groups.values()] == [group.linears for group in spec.groups]
    for group in spec.groups:
        assert len({name.rpartition(".")[0] for name in group.linears}) == 1
