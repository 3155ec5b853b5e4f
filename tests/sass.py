"""The machine code of compiled kernels, as NVIDIA's disassembler prints it."""

import re
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nvidia.cu13

#: Instructions behind which nothing follows, and those that go elsewhere.
_END = re.compile(r"^(BRA|EXIT|RET|BRX|JMP)\b")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class Instruction:
    predicate: str  # "" or "@P0", "@!UP1" ...
    text: str  # without the predicate

    @property
    def target(self) -> str | None:
        """The label that it may go to."""
        found = _TARGET.search(self.text)
        return found[1] if found else None

    @property
    def ends(self) -> bool:
        return not self.predicate and bool(_END.match(self.text))


@dataclass(frozen=True)
class Program:
    instructions: list[Instruction]
    labels: dict[str, int]  # of the instruction that follows

    @classmethod
    def of(cls, cubin: Path) -> "Program":
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in _disassembled(cubin).splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
            elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z].*?)\s*;", line):
                instructions.append(Instruction((code[1] or "").strip(), code[2]))
        return cls(instructions, labels)

    def find(self, pattern: str) -> list[int]:
        """Numbers of the instructions that match."""
        return [i for i, instruction in enumerate(self.instructions) if re.search(pattern, instruction.text)]

    def reachable(self, start: int) -> Iterator[Instruction]:
        """All instructions that may run from number ``start`` on."""
        seen: set[int] = set()
        waiting = [start]
        while waiting:
            at = waiting.pop()
            while at < len(self.instructions) and at not in seen:
                seen.add(at)
                instruction = self.instructions[at]
                yield instruction
                if instruction.target is not None:
                    waiting.append(self.labels[instruction.target])
                if instruction.ends:
                    break
                at += 1

    def registers(self, start: int = 0) -> int:
        """How many registers the instructions from number ``start`` on use."""
        wide = re.compile(r"HGMMA\.64x(\d+)x16\S* R(\d+)")
        most = 0
        for instruction in self.reachable(start):
            numbers = [int(number) + 1 for number in _REGISTER.findall(instruction.text)]
            if product := wide.match(instruction.text):
                numbers.append(int(product[2]) + int(product[1]) // 2)
            most = max(most, *numbers, 0) if numbers else most
        return most


def _disassembled(cubin: Path) -> str:
    tool = Path(next(iter(nvidia.cu13.__path__)), "bin", "nvdisasm")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)  # the wheel forgets it
    return subprocess.run([str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
