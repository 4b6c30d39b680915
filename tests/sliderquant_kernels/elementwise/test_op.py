"""RMSNorm, SiLU-mul and rotary embeddings: the kernels against plain torch, in the interpreter or on the GPU."""

import pytest
import torch
from torch import Tensor

from sliderquant_kernels.elementwise import kernels
from sliderquant_kernels.elementwise import op as elementwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Of the largest value: a sum in another order may round one value to its neighbour.
STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-5}


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 2).to(DEVICE, dtype)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    wide = expected.float()
    assert ((found.float() - wide).abs() <= STEP[found.dtype] * wide.abs().clamp(min=1e-3)).all()


def views(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    padded = torch.cat([x, x], -1)
    return {
        "contiguous": x,
        "slice": padded[..., : x.shape[-1]],
        "transposed": x.transpose(0, -2).contiguous().transpose(0, -2),
        "columns": x.mT.contiguous().mT,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 2, 100), (2, 3, 4, 16), (1, 7), (2, 1, 1), (0, 8)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = values(*shape, dtype=dtype), values(shape[-1], dtype=dtype, seed=1)
    for name, view in views(x).items():
        found = kernels.rms_norm(view, weight, 1e-5)
        assert_near(found, elementwise.reference_rms_norm(x, weight, 1e-5))
        assert found.is_contiguous(), name


def test_rms_norm_is_llamas() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    dtype = torch.bfloat16
    norm = LlamaRMSNorm(96, eps=1e-6).to(DEVICE, dtype)
    norm.weight.data = values(96, dtype=dtype, seed=2)
    x = values(2, 5, 96, dtype=dtype)
    assert torch.equal(elementwise.reference_rms_norm(x, norm.weight, 1e-6), norm(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 2, 1500), (4, 1024), (0, 8)], ids=str)
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = values(*shape, dtype=dtype), values(*shape, dtype=dtype, seed=1)
    expected = torch.nn.functional.silu(gate) * up
    for name, view in views(gate).items():
        assert_near(kernels.silu_mul(view, up), expected)
        assert_near(kernels.silu_mul(gate, views(up)[name]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size"), [(1, 1, (4, 2), 64), (3, 5, (3, 1), 24), (2, 0, (1, 1), 8)]
)
def test_rotary(batch: int, tokens: int, heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    # As attention has them: slices of one product, heads moved forward.
    product = values(batch, tokens, sum(heads) * size, dtype=dtype)
    q, k = (
        part.reshape(batch, tokens, part.shape[-1] // size, size).transpose(1, 2)
        for part in product.split([heads[0] * size, heads[1] * size], -1)
    )
    for rows in {1, batch}:
        angles = values(rows, tokens, size, dtype=torch.float32, seed=1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        expected = apply_rotary_pos_emb(q, k, cos, sin)
        for found, want, plain in zip(
            kernels.rotary(q, k, cos, sin), expected, elementwise.reference_rotary(q, k, cos, sin), strict=True
        ):
            assert torch.equal(found, want)
            assert torch.equal(plain, want)


def test_what_no_kernel_takes_goes_to_torch() -> None:
    x = values(2, 8, dtype=torch.float32).requires_grad_()
    weight = values(8, dtype=torch.float32, seed=1)
    elementwise.rms_norm(x, weight, 1e-6).sum().backward()
    elementwise.silu_mul(x, x).sum().backward()
    assert x.grad is not None
    q = values(2, 3, 4, 8, dtype=torch.float32).requires_grad_()
    cos, sin = values(1, 4, 8, dtype=torch.float32), values(1, 4, 8, dtype=torch.float32)
    sum(part.sum() for part in elementwise.rotary(q, q, cos, sin)).backward()
    assert q.grad is not None
    with pytest.raises(RuntimeError):
        elementwise.rms_norm(x, weight[:3], 1e-6)
