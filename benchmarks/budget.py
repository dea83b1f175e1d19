"""What a weight costs in instructions, counted without a GPU:

python benchmarks/budget.py
python benchmarks/budget.py --distribution normal
python benchmarks/budget.py --key-in-memory
python benchmarks/budget.py --json

Compiles kernels/fill.cu exactly as CuPy would, disassembles it, and follows the hot path: one turn of the
innermost loop that stores, as whole packets of the distribution take it, by default the truncated normal.
Of the paths round that loop with none but 16-byte stores, with the most stores, and with no call, it is the
longest: no branch flatters the count. benchmarks/budget.md keeps what was tried. Needs CuPy and the wheel
nvidia-cuda-nvdisasm, both in the `test` extra.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))  # a plain checkout

from gpuinit.backends import cuda

ARCHITECTURES = ("80", "90", "100")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}

# Each distribution has a loop of its own: in the kernel for those round 0 or in the other, by falling length.
LOOPS = {
    "truncated_normal": (False, 0),
    "uniform": (False, 1),
    "normal_between": (True, 0),
    "normal": (True, 1),
    "uniform_between": (True, 2),
}

# Where a sample's instructions go: the first pattern that fits an opcode names its class.
CLASSES = {
    "integer multiply": r"U?IMAD\.WIDE|U?IMAD\.HI|U?IMAD$|U?IMAD\.(LO|U32|X|SHL|IADD)",
    "integer logic": r"U?LOP3|U?SHF|U?LEA|U?IADD|VIADD|U?SEL|U?PRMT|U?PLOP3|U?SGXT|U?VIMNMX|U?IMNMX",
    "integer to float": r"I2F",
    "float multiply, add": r"FMUL|FADD|FFMA|DMUL|DADD|DFMA|FMNMX|FSEL|FSETP|DSETP|HADD",
    "reciprocal": r"MUFU",
    "table": r"LDG",
    "rounding to 16 bits": r"F2F|F2FP",
    "store": r"ST",
    "loop and the rest": r"",
}


class Instruction(NamedTuple):
    """One line of the disassembly."""

    predicate: str  # "@P0", "" where there is none
    opcode: str  # "IMAD.WIDE.U32"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".")[0]


class Block(NamedTuple):
    """Instructions that run one after another; where control goes then."""

    instructions: list[Instruction]
    successors: list[int]


class Function(NamedTuple):
    """One kernel, as compiled."""

    instructions: list[Instruction]
    labels: dict[str, int]  # to the number of an instruction
    registers: int
    local_bytes: int  # of the stack frame


def missing() -> str | None:
    """Why nothing can be counted here; None if it can."""
    try:
        import cupy
        from cupy.cuda import nvrtc
    except ImportError:
        return 'CuPy is not installed: pip install "gpuinit[test]"'
    try:
        nvrtc.getVersion()
    except Exception as error:
        return f"CuPy {cupy.__version__} finds no NVRTC ({error}): pip install 'gpuinit[test]'"
    if nvdisasm() is None:
        return 'nvdisasm is not here: pip install "gpuinit[test]"'
    return None


def nvdisasm() -> str | None:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [str(file.locate()) for file in files if file.name == "nvdisasm"]
    return paths[0] if paths else shutil.which("nvdisasm")


class Compiled(Exception):  # noqa: N818
    """Stops CuPy when it has the image and, next, would load it into the driver."""


def compile_as_cupy(source: str, architecture: str) -> bytes:
    """The image that CuPy makes of a RawKernel's source, with every option that it adds; no driver needed.

    CuPy's own function runs, up to where it saves the image in its cache. The one thing it asks a device on
    the way is its number, for a memo that is left out here.
    """
    from cupy._core import core
    from cupy.cuda import compiler

    class Cache:
        def load(self, name: str) -> None:
            return None

        def save(self, name: str, image: bytes, source: str) -> None:
            raise Compiled(image)

    replaced = compiler._get_arch_for_options_for_nvrtc, compiler._kernel_cache_backend
    compiler._get_arch_for_options_for_nvrtc = replaced[0].__wrapped__
    compiler._kernel_cache_backend = Cache()
    try:
        core.compile_with_cache(source, cuda.OPTIONS, arch=architecture, prepend_cupy_headers=False)
    except Compiled as compiled:
        image: bytes = compiled.args[0]
    finally:
        compiler._get_arch_for_options_for_nvrtc, compiler._kernel_cache_backend = replaced
    return image + b"\0"  # CuPy drops the last byte


def disassemble(image: bytes) -> dict[str, Function]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(image)
        command = [str(nvdisasm()), str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, frames = attribute(text, "REGCOUNT"), attribute(text, "FRAME_SIZE")
    functions = {}
    for part in text.split("\n.text.")[1:]:
        name, lines = part.split(":", 1)
        instructions, labels = parse(lines.split("\n//---")[0])
        functions[name] = Function(instructions, labels, registers[name], frames[name])
    return functions


def attribute(text: str, name: str) -> dict[str, int]:
    """A number that the image gives for every function."""
    pattern = rf"nvinfo : EIATTR_{name}\n.*?index@\(([\w$]+)\)\s+/\*\w+\*/\s+\.word\s+0x(\w+)"
    return {function: int(number, 16) for function, number in re.findall(pattern, text, re.DOTALL)}


def parse(lines: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels = {}
    for line in lines.splitlines():
        if label := re.fullmatch(r"([\w.$]+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def basic_blocks(function: Function) -> dict[int, Block]:
    """By the number of their first instruction. A call is a dead end: what it calls is never hot."""
    enders = ("BRA", "BRX", "EXIT", "CALL", "RET")
    ends = {i + 1 for i, instruction in enumerate(function.instructions) if instruction.name in enders}
    starts = sorted({0, *function.labels.values(), *ends} - {len(function.instructions)})
    blocks = {}
    for start, end in zip(starts, [*starts[1:], len(function.instructions)], strict=True):
        last = function.instructions[end - 1]
        successors = [end] if end < len(function.instructions) else []
        if last.name in ("BRX", "CALL", "EXIT", "RET") and not last.predicate:
            successors = []
        elif last.name == "BRA":
            *conditions, target = last.operands.replace("`(", "").replace(")", "").split(",")
            if not last.predicate and not conditions:
                successors = []
            successors = [*successors, function.labels[target.strip()]]
        blocks[start] = Block(function.instructions[start:end], successors)
    return blocks


def loops(blocks: dict[int, Block]) -> Iterator[tuple[int, set[int]]]:
    """Every loop: the block that it begins with, and all its blocks."""
    before: dict[int, set[int]] = {start: set() for start in blocks}
    for start, block in blocks.items():
        for successor in block.successors:
            before[successor].add(start)
    for latch, block in blocks.items():
        for head in block.successors:
            if head <= latch:
                body, left = {head}, [latch]
                while left:
                    start = left.pop()
                    if start not in body:
                        body.add(start)
                        left += before[start]
                yield head, body


def paths(blocks: dict[int, Block], head: int, body: set[int]) -> Iterator[list[int]]:
    """Every way once round a loop."""
    left = [[head]]
    while left:
        path = left.pop()
        for successor in blocks[path[-1]].successors:
            if successor == head:
                yield path
            elif successor in body and successor not in path:
                left.append([*path, successor])


def hot_path(function: Function, rank: int = 0) -> list[Instruction]:
    """One turn of the longest loop that makes whole packets, or of one that is shorter, by its rank."""
    return hot_paths(function)[rank]


def hot_paths(function: Function) -> list[list[Instruction]]:
    """One turn of every loop that makes packets, the longest first."""
    blocks = basic_blocks(function)
    storing = [(head, body) for head, body in loops(blocks) if any(has_store(blocks[b]) for b in body)]
    innermost = [(head, body) for head, body in storing if not any(other < body for _, other in storing)]
    turns = [
        max(
            (
                [instruction for block in path for instruction in blocks[block].instructions]
                for path in paths(blocks, head, body)
            ),
            key=work,
        )
        for head, body in innermost
    ]
    return sorted(turns, key=work, reverse=True)


def has_store(block: Block) -> bool:
    return any(instruction.name == "STG" for instruction in block.instructions)


def work(turn: list[Instruction]) -> tuple[int, int, int]:
    """The narrowest store; how many stores and instructions."""
    return min(store_bytes(turn), default=0), len(store_bytes(turn)), len(turn)


def store_bytes(turn: list[Instruction]) -> list[int]:
    """The width of each store."""
    bits = [re.search(r"\.[US]?(\d+)", store.opcode) for store in turn if store.name == "STG"]
    return [int(found[1]) // 8 if found else 4 for found in bits]


def class_of(instruction: Instruction) -> str:
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, instruction.opcode))


def measure(dtype: str, function: Function, rank: int = 0) -> dict[str, Any]:
    turn = hot_path(function, rank)
    samples = sum(store_bytes(turn)) / ITEM_BYTES[dtype]
    classes = Counter(map(class_of, turn))
    local = any(instruction.name in ("LDL", "STL") for instruction in function.instructions)
    return {
        "instructions_per_sample": len(turn) / samples,
        "registers": function.registers,
        "local_bytes": max(function.local_bytes, int(local)),
        "store_bytes": min(store_bytes(turn)),
        "samples_per_turn": int(samples),
        "by_class": {name: classes[name] / samples for name in CLASSES},
        "opcodes": dict(sorted(Counter(instruction.opcode for instruction in turn).items())),
    }


def budget(
    distribution: str = "truncated_normal", key_in_memory: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
    """By architecture and dtype."""
    shifted, rank = LOOPS[distribution]
    result = {}
    for architecture in ARCHITECTURES:
        functions = disassemble(compile_as_cupy(cuda.source(shifted, key_in_memory), architecture))
        result[f"sm_{architecture}"] = {
            dtype: measure(dtype, functions[f"fill_{dtype}"], rank) for dtype in ITEM_BYTES
        }
    return result


def table(result: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = []
    for architecture, by_dtype in result.items():
        rows = {"instructions per sample": [f"{b['instructions_per_sample']:.2f}" for b in by_dtype.values()]}
        for name in CLASSES:
            rows["  " + name] = [f"{b['by_class'][name]:.2f}" for b in by_dtype.values()]
        rows["samples in one turn"] = [str(b["samples_per_turn"]) for b in by_dtype.values()]
        rows["registers"] = [str(b["registers"]) for b in by_dtype.values()]
        rows["bytes of local memory"] = [str(b["local_bytes"]) for b in by_dtype.values()]
        rows["bytes a store"] = [str(b["store_bytes"]) for b in by_dtype.values()]
        lines += [f"{architecture:26}" + "".join(f"{dtype:>11}" for dtype in by_dtype)]
        lines += [f"{name:26}" + "".join(f"{value:>11}" for value in row) for name, row in rows.items()]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the kernel's instructions for each sample.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--distribution", choices=tuple(LOOPS), default="truncated_normal")
    parser.add_argument("--key-in-memory", action="store_true", help="the kernel that loads its key")
    parser.add_argument("--sass", metavar="sm_NN:DTYPE", help="print the hot path itself, as sm_90:float32")
    options = parser.parse_args()
    if problem := missing():
        parser.exit(1, f"{problem}\n")
    if options.sass:
        architecture, dtype = options.sass.removeprefix("sm_").split(":")
        shifted, rank = LOOPS[options.distribution]
        image = compile_as_cupy(cuda.source(shifted, options.key_in_memory), architecture)
        function = disassemble(image)[f"fill_{dtype}"]
        print("\n".join(" ".join(instruction) for instruction in hot_path(function, rank)))
        return
    result = budget(options.distribution, options.key_in_memory)
    if options.json:
        keys = ("instructions_per_sample", "registers", "local_bytes", "store_bytes")
        short = {
            architecture: {dtype: {key: b[key] for key in keys} for dtype, b in by_dtype.items()}
            for architecture, by_dtype in result.items()
        }
        print(json.dumps(short))
    else:
        print(table(result))


if __name__ == "__main__":
    main()
