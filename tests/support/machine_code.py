"""What a compiled kernel's machine code says of it: registers, spills, and what each of its loops does.

Read with the disassembler that Triton brings along, so it needs no GPU and no CUDA toolkit.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)(.*?);")
_LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
# Opcodes of products on tensor cores, of every architecture in the tables.
_PRODUCTS = {"HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA", "OMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA"}
_SPILLS = {"STL", "LDL"}


def read(binary, architecture: int) -> dict:
    """Facts of a kernel that `triton.compile` made.

    Returns:
        registers: of a thread. serialised: what ptxas says of products that wait for one another. split: whether a
        product of the tensor cores has its columns dealt to several warps, whose row sums then go through shared
        memory. loops: for each loop with products, its instructions, `products`, `spills`, `shuffles`, and
        `skipped`, the most products that one of its branches leads around; a loop that holds another is not among them.
    """
    code, usage = _disassemble(binary.asm["cubin"])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "serialised": _serialised(binary.asm["ptx"], architecture),
        "split": any(int(n) > 1 for n in re.findall(r"nvidia_mma<\{[^}]*warpsPerCTA = \[\d+, (\d+)\]", _ttgir(binary))),
        "loops": _loops(_parse(code)),
    }


def _ttgir(binary) -> str:
    return binary.asm["ttgir"]


def _tool(name: str) -> str:
    from triton.backends import nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        calls = ([_tool("nvdisasm"), "-c", file.name], [_tool("cuobjdump"), "-res-usage", file.name])
        return tuple(subprocess.run(call, capture_output=True, text=True, check=True).stdout for call in calls)
    finally:
        os.unlink(file.name)


def _serialised(ptx: str, architecture: int) -> list[str]:
    """Warnings of ptxas that products on tensor cores cannot overlap (C75xx), for compute capability 9."""
    if architecture != 90:
        return []
    from triton.backends.nvidia.compiler import get_ptxas

    # Triton 3.6 and later bring several, by architecture.
    ptxas = get_ptxas(architecture) if inspect.signature(get_ptxas).parameters else get_ptxas()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        call = [ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
    return re.findall(r"\(C75\d\d\)[^\n]*", done.stderr)


def _parse(code: str) -> list[tuple[str | None, str | None, str]]:
    """Labels and instructions in order: `(label, None, "")` or `(None, opcode, operands and the predicate)`."""
    found: list[tuple[str | None, str | None, str]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            found.append((label[1], None, ""))
        elif instruction := _INSTRUCTION.match(line):
            found.append((None, instruction[2], instruction[3] + (instruction[1] or "")))
    return found


def _loops(code: list[tuple[str | None, str | None, str]]) -> list[dict]:
    places = {label: i for i, (label, _, _) in enumerate(code) if label}
    spans = []
    for i, (_, opcode, operands) in enumerate(code):
        target = re.search(r"(\.L_x?_?\w+)", operands) if opcode and opcode.startswith("BRA") else None
        back = places.get(target[1], i) if target else i
        # Behind the end of the program lie blocks that were moved out of its way, which go back into it.
        if back < i and not any(name == "EXIT" and not rest.strip() for _, name, rest in code[back:i]):
            spans.append((back, i))
    found = []
    for first, last in spans:
        counts = Counter(opcode.split(".")[0] for _, opcode, _ in code[first : last + 1] if opcode)
        products = sum(counts[name] for name in _PRODUCTS)
        inner = any((first, last) != span and first <= span[0] and span[1] <= last for span in spans)
        if products and not inner:
            spills = sum(counts[name] for name in _SPILLS)
            total = sum(counts.values())
            facts = {"products": products, "spills": spills, "shuffles": counts["SHFL"]}
            facts["skipped"] = max(map(len, _skipped(code, places, first, last)), default=0)
            found.append({"instructions": total, **facts})
    return found


def _skipped(code: list, places: dict[str, int], first: int, last: int) -> list[list[str]]:
    """The products between each branch of a loop and where it leads within it."""
    found = []
    for i in range(first, last):
        _, opcode, operands = code[i]
        target = re.search(r"(\.L_x?_?\w+)", operands) if opcode and opcode.startswith("BRA") else None
        place = places.get(target[1], -1) if target else -1
        if i < place <= last:
            between = (name.split(".")[0] for _, name, _ in code[i:place] if name)
            found.append([name for name in between if name in _PRODUCTS])
    return found
