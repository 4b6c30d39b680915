"""The PTX of the unpacking, by emulation: every word, every width, on old and new architectures.

The few instructions it takes are executed by torch on many registers at once: a GPU is not needed to know that the text
computes the right numbers.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

from sliderquant_kernels.weight_only import fragments
from sliderquant_kernels.weight_only import unpack as unpack_triton

_WORDS = torch.arange(1 << 16)

_MASK = 0xFFFFFFFF


def _run(text: str, constraints: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Execute PTX; inputs and outputs are int64 tensors that hold 32-bit registers, `$i` counts outputs first."""
    outputs = constraints.split(",").count("=r")
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    assert constraints.split(",").count("r") == len(inputs)
    declared: set[str] = set()
    for statement in text.strip("{} ").split(";"):
        words = statement.replace(",", " ").split()
        if not words:
            continue
        opcode, *operands = words
        if opcode == ".reg":
            declared.update(operands[1:])
            continue
        target, sources = operands[0], [_value(operand, registers) for operand in operands[1:]]
        assert target.startswith("$") or target in declared, f"{target} is not declared"
        assert target not in {f"${outputs + i}" for i in range(len(inputs))}, "an input is overwritten"
        registers[target] = _execute(opcode, sources)
    return [registers[f"${i}"] for i in range(outputs)]


def _value(operand: str, registers: dict[str, torch.Tensor]) -> torch.Tensor:
    if re.fullmatch(r"0x[0-9A-Fa-f]+|\d+", operand):
        return torch.tensor(int(operand, 0))
    return registers[operand]


def _execute(opcode: str, sources: list[torch.Tensor]) -> torch.Tensor:
    name, *kind = opcode.split(".")
    if name == "mov":
        return sources[0]
    if name == "shr":
        return sources[0] >> sources[1]
    if name == "shl":
        return (sources[0] << sources[1]) & _MASK
    if name == "xor":
        return sources[0] ^ sources[1]
    if name == "lop3":
        a, b, c, table = sources
        assert int(table) == 0xEA
        return (a & b) | c
    dtype = torch.bfloat16 if kind[-1] == "bf16x2" else torch.float16
    a, b, *rest = (_halves(source, dtype) for source in sources)
    # One rounding of a result that fp64 holds exactly.
    exact = {"sub": lambda: a - b, "add": lambda: a + b, "fma": lambda: a * b + rest[0]}[name]()
    return _register(exact.to(dtype))


def _halves(register: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    parts = torch.stack([register & 0xFFFF, register >> 16], -1)
    return (parts - (parts >> 15) * 65536).to(torch.int16).view(dtype).double()


def _register(halves: torch.Tensor) -> torch.Tensor:
    parts = halves.view(torch.int16).long() & 0xFFFF
    return parts[..., 0] | (parts[..., 1] << 16)


def _pair(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Two 16-bit values as one register."""
    return low | (high << 16)


def _numbers(register: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The two 16-bit floating-point numbers of a register, `[..., 2]` fp64."""
    return _halves(register, dtype)


def _want(bits, words, beside, zero):
    for i in range(fragments.planes(bits)):
        if bits != 3:
            code = (words >> (bits * i)) & (2**bits - 1)
        elif i < 5:
            code = words >> fragments.WORD_STARTS[i] & 7
        elif i < 7:
            code = beside >> fragments.BYTE_STARTS[i - 5] & 7
        else:
            code = (beside >> fragments.LAST_LOW & 3) | (words >> fragments.LAST_HIGH & 1) << 2
        yield code.double() - zero


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_word(bits, dtype, symmetric, arch, apart):
    bf16 = dtype == torch.bfloat16
    parts = unpack_triton.parts(bits, apart)
    texts = [unpack_triton.unpack_ptx(bits, bf16, arch, symmetric, part) for part in parts]
    constraints = unpack_triton.unpack_constraints(bits, symmetric, len(parts[0]))
    generator = torch.Generator().manual_seed(0)
    # The other half of the register holds another word: neither may disturb the other.
    others = _WORDS[torch.randperm(1 << 16, generator=generator)]
    # Bytes, with anything above them.
    beside, other_beside = torch.randint(0, 1 << 16, (2, 1 << 16), generator=generator)
    inputs = [_pair(_WORDS, others)]
    if bits == 3:
        inputs.append(_pair(beside, other_beside))
    zeros = [2 ** (bits - 1)] if symmetric else sorted({0, 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1})
    for zero in zeros:
        stored = torch.tensor([zero + fragments.zero_bias(bits, dtype)]).to(dtype).view(torch.int16).long() & 0xFFFF
        raised = [_raised(stored, field.offset, bf16) for field in unpack_triton.fields(bits, bf16)]
        operands = [[] if symmetric else [_pair(raised[i], raised[i]) for i in part] for part in parts]
        got = [
            plane for text, of in zip(texts, operands, strict=True) for plane in _run(text, constraints, inputs + of)
        ]
        halves = zip(_want(bits, _WORDS, beside, zero), _want(bits, others, other_beside, zero), strict=True)
        for plane, (low, high) in zip(got, halves, strict=True):
            found = _numbers(plane, dtype)
            assert torch.equal(found[:, 0], low)
            assert torch.equal(found[:, 1], high)


def _raised(stored, offset, bf16):
    """What `raised_zero` computes; that one is Triton and is held to this by `test_raised_zero`."""
    mantissa = 7 if bf16 else 10
    value = stored & (2**mantissa - 1)
    return unpack_triton.power(offset, bf16) | value << offset if offset else stored


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("offset", [0, 2, 3, 4])
def test_raised_zero(offset, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float16
    stored = torch.arange(8) + fragments.zero_bias(4, dtype)
    pattern = (stored.to(dtype).view(torch.int16).long()) & 0xFFFF
    function = getattr(unpack_triton.raised_zero, "fn", unpack_triton.raised_zero)
    got = function(pattern, offset, bf16)
    raised = got.to(torch.int16).view(dtype).double()
    # The power at this place plus the zero-point.
    power = torch.tensor([unpack_triton.power(offset, bf16)]).to(torch.int16).view(dtype).double()
    assert torch.equal(raised, power + torch.arange(8))


def test_no_code_is_read_twice():
    """Fields cover a word, and a byte beside it: 16 or 24 bits, without gaps, and fit into a mantissa."""
    for bits in (2, 3, 4, 8):
        for bf16 in (False, True):
            fields = unpack_triton.fields(bits, bf16)
            taken = [
                16 * field.of_byte + field.shift + field.offset + bit
                for i, field in enumerate(fields)
                for bit in range(2 if (bits, i) == (3, 7) else bits)
            ]
            taken += [fragments.LAST_HIGH] if bits == 3 else []
            assert sorted(taken) == list(range(24 if bits == 3 else 16))
            assert bits == 8 or all(field.offset + bits <= (7 if bf16 else 10) for field in fields)
