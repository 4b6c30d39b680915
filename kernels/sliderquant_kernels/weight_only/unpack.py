"""From packed words to the operands of a matrix instruction, in registers.

A code q is placed into the mantissa of a power of two whose lowest bit at that place counts ones (128 + q in bfloat16,
1024 + q in float16, or a smaller power where q sits higher), by one three-input logic instruction and few shifts; then
the same power plus the zero-point is subtracted, which is exact. Source: the "magic number" conversion of Kim et al.,
"Who Says Elephants Can't Run" (arXiv 2211.10017), here for all widths and with zero-points for free.

Triton's interpreter cannot run PTX: there and wherever `ARCH` is 0, plain Triton computes the same numbers.
"""

# Triton's tuples grow, Python's types of them do not.
# mypy: allow-incomplete-defs, disable-error-code="assignment,misc"
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from .fragments import BYTE_STARTS, LAST_HIGH, LAST_LOW, WORD_STARTS
from .fragments import planes as planes_of

# A piece of assembly for every plane, or one for all of them. Of the results of one piece, Triton 3.8 alone gives only
# the first the layout of the matrix instruction's operand; the others go through shared memory, up to 244 KB of it.
# Elsewhere one piece takes up to 1.4% fewer instructions.
APART = triton.__version__.startswith("3.8.")


class Field(NamedTuple):
    """Where one code is found: `word >> shift`, or the byte in its place, has its lowest bit at `offset`."""

    shift: int
    offset: int
    of_byte: bool = False


def fields(bits: int, bf16: bool) -> tuple[Field, ...]:
    """The codes of a word, in order. A place high in the mantissa saves a shift: bf16 has 7 bits, fp16 has 10."""
    if bits == 2:
        return tuple(Field(shift, offset) for shift in (0, 6, 12) for offset in (0, 2, 4))[:8]
    if bits == 3:
        # The last one's high bit is two places below the code before it in the word, where the same shift has it.
        word = tuple(Field(start - offset, offset) for start, offset in zip(WORD_STARTS, (0, 3, 0, 3, 3), strict=True))
        return *word, *(Field(0, start, True) for start in BYTE_STARTS), Field(LAST_LOW, 0, True)
    if bits == 4:
        return (
            tuple(Field(4 * i, 0) for i in range(4)) if bf16 else (Field(0, 0), Field(0, 4), Field(8, 0), Field(8, 4))
        )
    return (Field(0, 0), Field(8, 0))


def parts(bits: int, apart: bool) -> tuple[tuple[int, ...], ...]:
    """The planes of each piece of assembly, see `APART`."""
    count = planes_of(bits)
    return tuple((i,) for i in range(count)) if apart else (tuple(range(count)),)


def power(offset: int, bf16: bool) -> int:
    """The 16 bits of the power of two whose mantissa bit `offset` counts ones."""
    mantissa, bias = (7, 127) if bf16 else (10, 15)
    return (mantissa - offset + bias) << mantissa


def unpack_ptx(bits: int, bf16: bool, arch: int, symmetric: bool, planes: Sequence[int]) -> str:
    """PTX from two words in the halves of a 32-bit register to registers of two operands, one for each of `planes`.

    Operands: an output for each plane; the words; for 3 bits the bytes beside them, one in each half, with anything
    above; then, unless the weight is symmetric, the power plus zero-point (8 bits in bf16: the zero-point) for each
    output.
    """
    kind = "bf16x2" if bf16 else "f16x2"
    found = fields(bits, bf16)
    word = len(planes)
    fused = bf16 and arch < 90  # sub.bf16x2 needs sm_90
    lines = [".reg .b32 w, one, negative, low, high;"]

    def pair(value: int) -> str:
        return f"0x{value << 16 | value:08X}"

    # An operand of its own, even a constant one, would tempt the compiler to unpack in a layout of its choice and to
    # carry the result through shared memory.
    zero = [f"${word + 1 + (bits == 3) + i}" for i in range(len(planes))]
    if symmetric:
        zero = [f"z{found[plane].offset}" for plane in planes]
        for offset in sorted({found[plane].offset for plane in planes}):
            raised = power(offset, bf16) | 2 ** (bits - 1) << offset
            value = 0x4300 if bits == 8 and bf16 else raised
            lines.append(f".reg .b32 z{offset}; mov.b32 z{offset}, {pair(value)};")

    def subtract(target: str, value: str, amount: str) -> None:
        if fused:
            lines.append(f"xor.b32 negative, {amount}, 0x80008000;")
            lines.append(f"fma.rn.bf16x2 {target}, {value}, one, negative;")
        else:
            lines.append(f"sub.{kind} {target}, {value}, {amount};")

    if fused:
        lines.append("mov.b32 one, 0x3F803F80;")
    if bits == 8 and bf16:
        # 128 + low nibble and 2048 + 16 * high nibble are exact, and so is every step to q - z.
        lines.append(".reg .b32 middle; mov.b32 middle, 0x45084508;")
        for i, plane in enumerate(planes):
            for name, shift, base in (("low", 8 * plane, 0x4300), ("high", 8 * plane + 4, 0x4500)):
                lines.append(f"shr.u32 w, ${word}, {shift};")
                lines.append(f"lop3.b32 {name}, w, 0x000F000F, {pair(base)}, 0xEA;")
            subtract("low", "low", zero[i])
            subtract("high", "high", "middle")
            lines.append(f"fma.rn.bf16x2 ${i}, low, one, high;" if fused else f"add.bf16x2 ${i}, low, high;")
        return "{ " + " ".join(lines) + " }"
    moved: dict[tuple[int, bool], str] = {(0, False): f"${word}", (0, True): f"${word + 1}"}

    def shifted(shift: int, of_byte: bool) -> str:
        if (shift, of_byte) not in moved:
            name = moved[shift, of_byte] = f"{'b' if of_byte else 'w'}{shift}"
            lines.append(f".reg .b32 {name}; shr.u32 {name}, {moved[0, of_byte]}, {shift};")
        return moved[shift, of_byte]

    for i, plane in enumerate(planes):
        shift, offset, of_byte = found[plane]
        # (word & mask) | power
        mask = (2 ** (2 if of_byte and shift else bits) - 1) << offset
        source = shifted(shift, of_byte)
        lines.append(f"lop3.b32 ${i}, {source}, {pair(mask)}, {pair(power(offset, bf16))}, 0xEA;")
        if of_byte and shift:  # two bits of three
            lines.append(f"lop3.b32 ${i}, {shifted(LAST_HIGH - 2, False)}, {pair(4)}, ${i}, 0xEA;")
        subtract(f"${i}", f"${i}", zero[i])
    return "{ " + " ".join(lines) + " }"


def unpack_constraints(bits: int, symmetric: bool, count: int) -> str:
    """The register constraints of `unpack_ptx` for `count` planes."""
    return ",".join(["=r"] * count + ["r"] * (1 + (bits == 3) + (0 if symmetric else count)))


# Tables for the kernels, which can read a constant but not call Python.
_APART: tl.constexpr = tl.constexpr(APART)
_PTX: tl.constexpr = tl.constexpr(
    {
        100000 * i + 10000 * symmetric + 1000 * bits + 100 * bf16 + arch: unpack_ptx(bits, bf16, arch, symmetric, part)
        for symmetric, bits, bf16, arch in itertools.product((False, True), (2, 3, 4, 8), (False, True), (80, 90))
        for i, part in enumerate(parts(bits, APART))
    }
)
_CONSTRAINTS: tl.constexpr = tl.constexpr(
    {
        10 * bits + symmetric: unpack_constraints(bits, symmetric, len(parts(bits, APART)[0]))
        for symmetric, bits in itertools.product((False, True), (2, 3, 4, 8))
    }
)
_OFFSETS: tl.constexpr = tl.constexpr(
    {
        1000 * bits + 100 * bf16 + i: field.offset
        for bits, bf16 in itertools.product((2, 3, 4, 8), (False, True))
        for i, field in enumerate(fields(bits, bf16))
    }
)
# Of 3 bits, for plain Triton: the bit at which a plane's code starts, in the word or, from `_IN_BYTE` on, in the byte.
_STARTS: tl.constexpr = tl.constexpr((*WORD_STARTS, *BYTE_STARTS, LAST_LOW))
_IN_BYTE: tl.constexpr = tl.constexpr(len(WORD_STARTS))
_LAST_HIGH: tl.constexpr = tl.constexpr(LAST_HIGH)


@triton.jit
def raised_zero(zero, OFFSET: tl.constexpr, BF16: tl.constexpr):
    """16 bits of (power + zero-point) at place 0 -> at place OFFSET: the zero-point moves up, the exponent down."""
    if OFFSET == 0:
        return zero
    if BF16:
        return ((zero & 0x7F) << OFFSET) | (0x4300 - OFFSET * 0x80)
    return ((zero & 0x3FF) << OFFSET) | (0x6400 - OFFSET * 0x400)


@triton.jit
def unpack_planes(words, beside, zeros, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, OPERAND: tl.constexpr,
                  BF16: tl.constexpr, ZERO_BIAS: tl.constexpr, ARCH: tl.constexpr):  # fmt: skip
    """Words -> a tuple of P planes of q - z in OPERAND.

    Args:
        words: uint16, any shape.
        beside: 3 bits: uint16 of the same shape, the byte beside each word in its low half; otherwise unused.
        zeros: stored (biased) zero-points, broadcastable to `words`, in the activations' dtype, which is that of the
            planes under PTX; a tuple of as many as there are groups in a block. Only the dtype counts when SYMMETRIC.
        ARCH: 80, 90, ... for PTX; 0 for plain Triton.
    """
    PLANES: tl.constexpr = 16 // (2 if BITS == 3 else BITS)
    SHARE: tl.constexpr = PLANES // len(zeros)
    if ARCH == 0:
        q = words.to(tl.int32)
        out = ()
        for i in tl.static_range(PLANES):
            if BITS != 3:
                value = (q >> (BITS * i)) & (2**BITS - 1)
            elif i < _IN_BYTE:
                value = (q >> _STARTS[i]) & 7
            else:
                value = (beside.to(tl.int32) >> _STARTS[i]) & 7
                if i == PLANES - 1:
                    value = (value & 3) | (((q >> _LAST_HIGH) & 1) << 2)
            if SYMMETRIC:
                value -= 2 ** (BITS - 1)
            else:
                value -= zeros[i // SHARE].to(tl.float32).to(tl.int32) - ZERO_BIAS
            out = out + (value.to(OPERAND),)
    else:
        KEY: tl.constexpr = 10000 * SYMMETRIC + 1000 * BITS + 100 * BF16 + (90 if ARCH >= 90 else 80)
        CONSTRAINTS: tl.constexpr = _CONSTRAINTS[10 * BITS + SYMMETRIC]
        codes = (words, beside) if BITS == 3 else (words,)
        raised = ()
        if not SYMMETRIC and not _APART:
            for i in tl.static_range(PLANES):
                zero = zeros[i // SHARE].to(tl.uint16, bitcast=True)
                raised = raised + (raised_zero(zero, _OFFSETS[1000 * BITS + 100 * BF16 + i], BF16),)
        # A dtype that comes as a compile-time argument is not accepted inside a tuple: hence `like.dtype`.
        like = zeros[0]
        if _APART:
            out = ()
            for i in tl.static_range(PLANES):
                operands = codes
                if not SYMMETRIC:
                    # Raised here, not before all planes: otherwise a tile of sm_100 spills.
                    zero = zeros[i // SHARE].to(tl.uint16, bitcast=True)
                    operands = codes + (raised_zero(zero, _OFFSETS[1000 * BITS + 100 * BF16 + i], BF16),)
                plane = tl.inline_asm_elementwise(_PTX[KEY + 100000 * i], CONSTRAINTS, operands, like.dtype, True, 2)
                out = out + (plane,)
        elif BITS == 8:
            out = tl.inline_asm_elementwise(_PTX[KEY], CONSTRAINTS, codes + raised, (like.dtype, like.dtype), True, 2)
        elif BITS == 4:
            out = tl.inline_asm_elementwise(_PTX[KEY], CONSTRAINTS, codes + raised,
                                             (like.dtype, like.dtype, like.dtype, like.dtype), True, 2)  # fmt: skip
        else:
            out = tl.inline_asm_elementwise(_PTX[KEY], CONSTRAINTS, codes + raised,
                                             (like.dtype, like.dtype, like.dtype, like.dtype,
                                              like.dtype, like.dtype, like.dtype, like.dtype), True, 2)  # fmt: skip
    return out
