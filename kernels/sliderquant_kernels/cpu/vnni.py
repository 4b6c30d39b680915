"""Linears by a compiled loop of AVX512-VNNI or AMX instructions, `vnni.c`, which multiply integers of 8 bits.

With activations of 4 or 8 bits it rounds tokens as `activations.op.quantize` and multiplies as `low_bit.cpu`, to the
same bits, with AMX too.

With weights alone quantized, tokens become integers of 16 bits with a scale for each token and group of inputs: x is
rounded by at most 2^-16 of the largest |x| in its group, where bf16 itself is good for 2^-9 of each x. Products with
the codes are exact, in two halves of 8 bits; their sums are scaled and added in fp32, once a group. Rows of the result
do not depend on each other. With AMX, 8 tokens and more stay bf16 and are multiplied with the integers q - z; rows do
not depend on each other there either, but have other bits. Many tokens are multiplied by torch in bf16, after
dequantizing a part of the weight.

A direct linear does either in one call for a weight that was checked once: what torch's ops take to launch for one
token is more than the product takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.layout import PackedLayout, PackedWeight
from ..common.quantized import QuantizedActivations
from . import native, vnni_blocks
from .scratch import scratch

__all__ = [
    "DirectVnniLinear",
    "Rounding",
    "dequantized_chunks",
    "low_bit_linear",
    "prefers_torch",
    "quantize",
    "takes",
    "weight_only_linear",
]

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_PLAIN, _GROUPED, _WIDE = range(3)
_NO_LOOP = "there is no compiled loop on this machine; pack the weight here with choose_layout"
# Tokens from which AMX multiplies; from which dequantizing to bf16 and torch's matmul take less time than the loop with
# integers of 16 bits; and than the one with AMX.
_MIN_AMX_TOKENS = 8
_MIN_BF16_TOKENS = 160
_MIN_AMX_BF16_TOKENS = 192
# Less work than this takes less time than waking another thread does.
_VALUES_PER_THREAD = 1 << 14
_PRODUCTS_PER_THREAD = 1 << 18
# Two threads share a chunk of torch's matmul, which takes up to twice as long with few columns.
_CHUNK_WEIGHTS = 1 << 22


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "x_scale", "x_zero", "x_sum", "group_sum")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero", "last", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("m", "k", "x_stride", "code_stride", "first_block", "n", "scale_stride")),
        *((name, ctypes.c_int64) for name in ("k_blocks", "groups", "out_stride")),
        *((name, ctypes.c_int64) for name in ("amx_tokens", "values_per_thread", "products_per_thread")),
        *((name, ctypes.c_float) for name in ("clip_low", "clip_high")),
        *((name, ctypes.c_int32) for name in ("x_type", "x_bits", "x_symmetric", "shift", "mode", "out_type")),
        *((name, ctypes.c_int32) for name in ("threads", "rounded")),
        *((name, ctypes.c_void_p) for name in ("parallel", "number", "count", "tiles")),
    )


class Rounding(NamedTuple):
    """How a linear rounds its input, see `quantize_activations`."""

    bits: int
    symmetric: bool
    clip: tuple[float, float] | None


def takes(dtype: torch.dtype) -> bool:
    """Whether tokens of this dtype are rounded here: fp32 and bf16."""
    return dtype in _TYPES


def prefers_torch(tokens: int) -> bool:
    """Whether dequantizing and torch's matmul in bf16 are faster for so many tokens that are not rounded."""
    return tokens >= (_MIN_AMX_BF16_TOKENS if native.has_amx() else _MIN_BF16_TOKENS)


def quantize(
    x: Tensor, bits: int, symmetric: bool, clip: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`activations.op.quantize` of x `[..., K]`, fp32 or bf16, to the same bits, if all is finite."""
    tokens, k = x.shape[:-1], x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    codes = x.new_empty(m, k, dtype=torch.int8)
    scale = x.new_empty(m, dtype=torch.float32)
    zero, total = (x.new_empty(m, dtype=torch.int32) for _ in range(2))
    job = _new_job(m=m, k=k, groups=1)
    _set_tokens(job, rows, Rounding(bits, symmetric, (clip[0], clip[1]) if clip is not None else None))
    job.codes, job.x_scale, job.x_sum, job.code_stride = codes.data_ptr(), scale.data_ptr(), total.data_ptr(), k
    if symmetric:
        zero.zero_()
    else:
        job.x_zero = zero.data_ptr()
    _run(job, 4)
    return codes.view(x.shape), scale.view(tokens), zero.view(tokens), total.view(tokens)


def low_bit_linear(
    activations: QuantizedActivations,
    packed: PackedWeight,
    layout: PackedLayout,
    dtype: torch.dtype,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`low_bit.cpu.low_bit_linear` for a weight of kind `cpu_vnni`, to the same bits."""
    codes, x_scale, x_zero, x_sum = activations
    tokens = codes.shape[:-1]
    rows = codes.reshape(-1, layout.k).contiguous()
    missing = packed.weight.shape[1] * vnni_blocks.block_inputs(layout.bits) - layout.k
    if missing:
        rows = pad(rows, (0, missing))
    m, wide = rows.shape[0], not takes(dtype)
    # Whatever the loop reads is contiguous, and kept until it has done so.
    x_scale, x_sum = x_scale.reshape(-1).contiguous(), x_sum.reshape(-1).contiguous()
    x_zero = None if x_zero is None else x_zero.reshape(-1).contiguous()
    added = [None if t is None or wide else t.reshape(-1, layout.n).contiguous() for t in (bias, residual)]
    y = codes.new_empty(m, layout.n, dtype=torch.float32 if wide else dtype)
    sums = codes.new_empty(m, layout.groups, dtype=torch.int32) if layout.group_size else None
    job = _job_of(packed, layout, y.dtype)
    job.m, job.codes, job.code_stride, job.out = m, rows.data_ptr(), rows.shape[1], y.data_ptr()
    job.x_scale, job.x_sum, job.x_zero, job.group_sum = x_scale.data_ptr(), x_sum.data_ptr(), _at(x_zero), _at(sums)
    job.bias, job.residual = _at(added[0]), _at(added[1])
    _run(job, layout.bits)
    if wide:
        for t in (bias, residual):
            if t is not None:
                y += t.reshape(-1, layout.n).float()
    return y.to(dtype).view(*tokens, layout.n)


def weight_only_linear(
    x: Tensor,
    packed: PackedWeight,
    layout: PackedLayout,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """x `[..., K]` bf16 -> `[..., N]` bf16, contiguous; the weight is of kind `cpu_vnni`."""
    bias = None if bias is None else bias.contiguous()
    direct = DirectVnniLinear(packed, layout, torch.bfloat16, bias, None, amx=not batch_invariant)
    return direct(x) if residual is None else direct.parts(x, (layout.n,), residual.contiguous())[0]


def dequantized_chunks(
    packed: PackedWeight, layout: PackedLayout, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their weights `[K, rows]` in bf16 or fp32, rounded once), each valid until the next one is asked for."""
    job = _job_of(packed, layout, dtype)
    step = max(1, _CHUNK_WEIGHTS // (layout.k * 2 * vnni_blocks.ROWS)) * 2 * vnni_blocks.ROWS
    for start in range(0, layout.n, step):
        size = min(step, layout.n - start)
        padded = -(-size // vnni_blocks.ROWS) * vnni_blocks.ROWS
        w = scratch("weights", dtype, layout.k, padded)
        job.first_block, job.n, job.out, job.out_stride = start // vnni_blocks.ROWS, size, w.data_ptr(), padded
        _run(job, layout.bits)
        yield slice(start, start + size), w[:, :size]


class DirectVnniLinear:
    """A linear layer for one weight whose arguments were checked once, with the bits of the ops.

    With a rounding it is `quantize_activations` and `low_bit_linear`, else `weight_only_linear`, without the dispatcher
    and its checks. It serves eager calls without gradients; tracing needs the ops.
    """

    __slots__ = (
        "_amx",
        "_function",
        "_places",
        "_prepared",
        "_tensors",
        "bias",
        "dtype",
        "layout",
        "packed",
        "rounding",
    )

    def __init__(
        self,
        packed: PackedWeight,
        layout: PackedLayout,
        dtype: torch.dtype,
        bias: Tensor | None,
        rounding: Rounding | None,
        amx: bool = True,
    ) -> None:
        """packed, layout: of kind `cpu_vnni`, checked; dtype: of x and of the result, fp32 or bf16; bias: `[N]`,
        contiguous; amx: without it, a row of a weight-only result has the same bits alone as among others."""
        self.packed, self.layout, self.dtype, self.bias, self.rounding = packed, layout, dtype, bias, rounding
        self._amx = amx
        self._function = native.vnni_linear(layout.bits)
        self._tensors = [t for t in (*packed, bias) if t is not None]
        self._places: list[int] = []
        self._prepared: tuple[_Job, int] | None = None

    def _job(self) -> tuple[_Job, int]:
        """What all calls have in common, and its address. Calls read it alone: any number of threads may be in one."""
        # Sharing memory between processes moves tensors, and so does who sets `.data`.
        places = [t.data_ptr() for t in self._tensors]
        prepared = self._prepared
        if prepared is None or places != self._places:
            job = _job_of(self.packed, self.layout, self.dtype)
            job.amx_tokens = _MIN_AMX_TOKENS if self._amx else 0
            job.code_stride = self.packed.weight.shape[1] * vnni_blocks.block_inputs(self.layout.bits)
            job.bias, job.x_type = _at(self.bias), _TYPES[self.dtype]
            _set_rounding(job, self.rounding)
            prepared = self._prepared = (job, ctypes.addressof(job))
            self._places = places
        return prepared

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is what the ops would compute with these tensors, outside of gradients and tracing."""
        return (
            type(x) is Tensor
            and x.dtype == self.dtype
            and x.ndim > 0
            and x.shape[-1] == self.layout.k
            and x.is_cpu
            and not (x.requires_grad and torch.is_grad_enabled())
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`, contiguous."""
        if self._function is None:
            raise RuntimeError(_NO_LOOP)
        layout, x = self.layout, x.contiguous()
        y = x.new_empty((*x.shape[:-1], layout.n))
        tokens = x.numel() // layout.k
        _job, address = self._job()  # which holds what the address is of
        if self._function(address, x.data_ptr(), tokens, y.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for {tokens} rounded tokens of {layout.k} inputs")
        return y

    def parts(self, x: Tensor, sizes: Sequence[int], residual: Tensor | None = None) -> list[Tensor]:
        """The first `sizes[0]` outputs, the next, and so on, each `[..., size]` and contiguous.

        residual: added to the only part, contiguous.
        """
        if any(size % vnni_blocks.ROWS for size in sizes[:-1]):
            return [part.contiguous() for part in self(x).split(list(sizes), -1)]
        layout, rows = self.layout, x.reshape(-1, self.layout.k).contiguous()
        m = rows.shape[0]
        job = _Job.from_buffer_copy(self._job()[0])
        job.m, job.threads, job.residual = m, torch.get_num_threads(), _at(residual)
        job.x, job.x_stride = rows.data_ptr(), layout.k
        rows_of_codes = 2 * m if job.mode == _WIDE else m
        codes = x.new_empty(rows_of_codes, job.code_stride, dtype=torch.int8)
        scale = x.new_empty(m, job.groups if job.mode == _WIDE else 1, dtype=torch.float32)
        x_sum, x_zero = (x.new_empty(m, dtype=torch.int32) for _ in range(2))
        job.codes, job.x_scale, job.x_sum = codes.data_ptr(), scale.data_ptr(), x_sum.data_ptr()
        job.x_zero = None if job.x_symmetric else x_zero.data_ptr()
        group_sum = x.new_empty(m, job.groups, dtype=torch.int32)
        job.group_sum = None if job.mode == _PLAIN else group_sum.data_ptr()
        found, first = [], 0
        for size in sizes:
            y = x.new_empty(m, size)
            job.first_block, job.n, job.out = first // vnni_blocks.ROWS, size, y.data_ptr()
            if first and self.bias is not None:
                job.bias = self.bias.data_ptr() + first * self.bias.element_size()
            _run(job, layout.bits)
            job.rounded = True
            found.append(y.view(*x.shape[:-1], size))
            first += size
        return found


def _new_job(**fields: int) -> _Job:
    runtime = native.openmp() or (None, None, None)
    parallel, number, count = (None if function is None else function.value for function in runtime)
    return _Job(
        parallel=parallel,
        number=number,
        count=count,
        threads=torch.get_num_threads(),
        amx_tokens=_MIN_AMX_TOKENS,
        values_per_thread=_VALUES_PER_THREAD,
        products_per_thread=_PRODUCTS_PER_THREAD,
        **fields,
    )


def _job_of(packed: PackedWeight, layout: PackedLayout, out_type: torch.dtype) -> _Job:
    weight, scale, zero = packed
    job = _new_job(
        weight=weight.data_ptr(),
        scale=scale.data_ptr(),
        k=layout.k,
        n=layout.n,
        k_blocks=weight.shape[1],
        groups=layout.groups,
        out_type=_TYPES[out_type],
    )
    job.zero = _at(zero)
    job.shift = layout.code_offset
    if layout.rounds_activations:
        assert zero is not None
        job.last, job.scale_stride = zero[-1].data_ptr(), scale.shape[1]
        job.mode = _PLAIN if layout.group_size is None else _GROUPED
    else:
        job.groups = layout.k // vnni_blocks.token_group(layout.k, layout.group_size)
        # Per channel all groups of a token have the same scales and zero-points of the weight.
        job.scale_stride = 0 if layout.group_size is None else scale.shape[1]
        job.mode = _WIDE
    return job


def _set_tokens(job: _Job, rows: Tensor, rounding: Rounding) -> None:
    """rows `[m, K]`, contiguous."""
    job.x, job.x_stride, job.x_type = rows.data_ptr(), rows.shape[1], _TYPES[rows.dtype]
    _set_rounding(job, rounding)


def _set_rounding(job: _Job, rounding: Rounding | None) -> None:
    if rounding is not None:
        job.x_bits, job.x_symmetric = rounding.bits, rounding.symmetric
        job.clip_low, job.clip_high = rounding.clip or (1.0, 1.0)


def _run(job: _Job, bits: int) -> None:
    function = native.vnni(bits)
    if function is None:
        raise RuntimeError(_NO_LOOP)
    function(ctypes.addressof(job))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
