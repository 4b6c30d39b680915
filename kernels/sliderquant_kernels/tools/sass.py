"""Figures from the machine code of a compiled kernel, by the disassembler that comes with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_MATRIX = re.compile(r"UTC\w*MMA|(?:HG|IG|QG|H|I|Q)MMA")
_REGISTERS_PER_SM = 65536
_WARPS_PER_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_SHARED_PER_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KB


@dataclass(frozen=True)
class MachineCode:
    """What the disassembler printed.

    Attributes:
        instructions: (address, opcode, operands), in order.
        registers, stack: per thread, the stack in bytes.
    """

    instructions: tuple[tuple[int, str, str], ...]
    registers: int
    stack: int

    def count(self) -> int:
        """Instructions, without padding."""
        return _count(self.instructions)

    def spilled(self) -> int:
        """Bytes per thread of registers that were put aside in local memory. A stack that nothing uses is not one."""
        used = any(opcode.startswith(("STL", "LDL")) for _, opcode, _ in self.instructions)
        return self.stack if used else 0

    def matrix_instruction(self) -> str:
        """`HMMA`, `HGMMA`, `UTCHMMA`, ...: what multiplies; `none`."""
        found = {match[0] for _, opcode, _ in self.instructions if (match := _MATRIX.match(opcode))}
        return "+".join(sorted(found)) or "none"

    def weights_from(self) -> str:
        """Where the matrix instruction takes its left operand from: `registers`, `shared`, or `-` without one.

        mma.sync always reads registers; then the question is whether arithmetic has put the weight there or a load
        from shared memory, to which it had gone after being dequantized. wgmma says it by its operand; tcgen05 never
        reads registers.
        """
        loop = self.main_loop() or self.instructions
        kind = self.matrix_instruction()
        if kind == "none":
            return "-"
        if kind.startswith("UTC"):
            return "shared"
        left = [_operands(text)[1] for _, opcode, text in loop if _MATRIX.match(opcode)]
        if "GMMA" in kind:
            return "registers" if all(operand.startswith("R") for operand in left) else "shared"
        writers: dict[int, str] = {}
        loaded = 0
        # Twice around: what the first iteration finds in its registers was written at the end of the one before.
        for turn in range(2):
            for _, opcode, text in loop:
                operands = _operands(text)
                if turn and _MATRIX.match(opcode):
                    loaded += writers.get(_register(operands[1]), "").startswith("LDS")
                target = _register(operands[0]) if operands else -1
                for register in range(target, target + _registers_written(opcode)) if target >= 0 else ():
                    writers[register] = opcode
        return "shared" if loaded > len(left) // 2 else "registers"

    def main_loop(self) -> tuple[tuple[int, str, str], ...] | None:
        """The body of the innermost loop that holds the most matrix instructions, or None."""
        best: tuple[tuple[int, str, str], ...] | None = None
        best_score = (0, 0)
        for address, opcode, text in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", text) if opcode.startswith("BRA") else None
            if target is None or int(target[1], 16) >= address:
                continue
            body = tuple(i for i in self.instructions if int(target[1], 16) <= i[0] <= address)
            # Behind the end of the kernel lie the blocks that wait; each goes back to where it was waited.
            if any(i[1] == "EXIT" for i in body):
                continue
            score = (sum(bool(_MATRIX.match(i[1])) for i in body), -len(body))
            if score[0] and score > best_score:
                best, best_score = body, score
        return best

    def waits(self) -> str:
        """How many groups of wgmma products may still be under way after each wait of the main loop: `0` waits for all
        of them, `1` leaves the last one to run beside the next step. In the loop's order, `0,0`; `-` without wgmma."""
        if "GMMA" not in self.matrix_instruction():
            return "-"
        loop = self.main_loop() or self.instructions
        waits = [_operands(text)[-1] for _, opcode, text in loop if opcode.startswith("WARPGROUP.DEPBAR")]
        return ",".join(str(int(wait, 16)) for wait in waits) or "-"

    def loop_count(self) -> int:
        """Instructions of the main loop, of the whole kernel where there is none, without padding."""
        return _count(self.main_loop() or self.instructions)

    def programs_per_sm(self, arch: int, num_warps: int, shared: int) -> int:
        """Programs that fit on one multiprocessor; shared: bytes that one takes."""
        by_registers = _REGISTERS_PER_SM // (-(-self.registers // 8) * 8 * 32 * num_warps)
        by_shared = (_SHARED_PER_SM[arch] << 10) // (shared + 1024)
        return max(min(by_registers, by_shared, _WARPS_PER_SM[arch] // num_warps), 0)


def disassemble(cubin: bytes) -> MachineCode:
    """Raises RuntimeError when the disassembler fails or prints something else than it used to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        runs = [subprocess.run([tool, flag, file], capture_output=True, text=True) for flag in ("-sass", "-res-usage")]
    for run in runs:
        if run.returncode:
            raise RuntimeError(f"cuobjdump failed: {run.stderr.strip()}")
    found = map(_INSTRUCTION.match, runs[0].stdout.splitlines())
    instructions = tuple((int(match[1], 16), match[2], match[3]) for match in found if match)
    usage = runs[1].stdout + runs[1].stderr
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    if not instructions or registers is None or stack is None:
        raise RuntimeError("cuobjdump printed no code or no resource usage: its output format has changed")
    return MachineCode(instructions, int(registers[1]), int(stack[1]))


def _count(instructions: tuple[tuple[int, str, str], ...]) -> int:
    return sum(opcode != "NOP" for _, opcode, _ in instructions)


def _operands(text: str) -> list[str]:
    return [operand.strip() for operand in text.split(",")]


def _register(operand: str) -> int:
    found = re.match(r"R(\d+)", operand)
    return int(found[1]) if found else -1


def _registers_written(opcode: str) -> int:
    if opcode.startswith("LDSM"):
        return {"4": 4, "2": 2}.get(opcode.rsplit(".", 1)[-1], 1)
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1
