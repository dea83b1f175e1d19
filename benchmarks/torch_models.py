"""Real models' own recipes, drawn from streams, beside plain torch: python benchmarks/torch_models.py

Needs the extra `torch`, transformers and tqdm; torchtitan, timm and diffusers are used where they are. The
models are those of tests/model_zoo.py: real architectures, small, nothing downloaded. Of every model:

    recipe    parameters that are the library's: our seed decides on them where the library draws them (where
              they change with torch's seed), and the others are its own, byte for byte. All are NaN before
    fit       drawn parameters whose mean and standard deviation are the library's, by a z-test of many runs
              each. FALSE_ALARMS is the chance that any of all parameters of all models is named unjustly
    siblings  parameters that stay as they are, as bytes, in a second run, under another torch.manual_seed,
              with the recipe walking the modules backwards, and with the modules registered backwards
    2 ranks   parameters of the model built on meta, fully_shard, to_empty and initialize_ in two gloo
              processes that equal those of one process, bit for bit; and for three models four processes

What is not equal is listed with its cause. `--loss` and `--speed` make two more tables instead.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]  # a plain checkout

import cpu
import model_zoo  # type: ignore[import-not-found]
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gpuinit
import gpuinit.torch as gt

RESULTS = ROOT / "benchmarks" / "results"
FALSE_ALARMS = 1e-3  # in a whole run of this script, shared by all parameters and both moments
MOST_TESTS = 10_000  # more than there are
RUNS = (8, 32)  # of each recipe, the fewest and the most; SAMPLE may ask for more
ELEMENTS = 2**24  # between them as many as draw so many elements
SAMPLE = 256  # elements of a parameter at least, of all runs; of fewer, z-scores are no longer normal
SEED = 2**63 + 5
SQUARES = ("llama", "bert", "mixtral")  # on a 2x2 mesh too
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "query", "key", "value")
ROWS = ("o_proj", "down_proj")
VOCABULARY, SEEDS, BATCHES = 8000, 3, 4  # of --loss
PACKAGES = ("torch", "transformers", "torchtitan", "timm", "diffusers", "numba", "numpy")

Digests = dict[str, str]


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensor: torch.Tensor) -> str:
    memory = whole(tensor).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memory.numpy().tobytes()).hexdigest()[:16]


def digests(model: nn.Module) -> Digests:
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


def poison(model: nn.Module, buffers: bool = False) -> nn.Module:
    """Nothing of what is there is left, so that what a recipe does not write is seen."""
    for tensor in (*model.parameters(), *(model.buffers() if buffers else ())):
        memory = tensor.detach()
        memory = memory.to_local() if isinstance(memory, DTensor) else memory
        memory.fill_(math.nan if memory.is_floating_point() else 77)
    return model


def initialize(model: nn.Module, seed: int = SEED) -> Any:
    return gt.initialize_(
        model, seed=seed, recipe="own", strict=False
    )  # the report says what was not written


# Are the parameters those of the library?


class Moments:
    """Sums of the powers of what a parameter was in many runs, and how often it changed."""

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)
        self.seen: set[str] = set()

    def add(self, tensor: torch.Tensor) -> None:
        values = tensor.detach().double().reshape(-1)
        squares = values * values
        sums = [values.sum(), squares.sum(), values @ squares, squares @ squares]
        self.sums += torch.tensor([values.numel(), *sums], dtype=torch.float64)
        self.seen.add(digest(tensor))

    def central(self) -> tuple[float, float, float, float]:
        """Count, mean, variance and kurtosis."""
        count, *powers = self.sums.tolist()
        mean, second, third, fourth = (power / count for power in powers)
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return count, mean, variance, central / variance**2 if variance > 0 else math.nan


def z_scores(ours: Moments, theirs: Moments) -> tuple[float, float]:
    """Of the difference of means and of the logarithms of standard deviations, by their sampling errors."""
    (n, mean, variance, kurtosis), (m, mean_there, variance_there, kurtosis_there) = (
        ours.central(),
        theirs.central(),
    )
    if not (variance > 0 and variance_there > 0):
        return math.inf, math.inf
    of_mean = (mean - mean_there) / math.sqrt(variance / n + variance_there / m)
    error = math.sqrt((kurtosis - 1) / (4 * n) + (kurtosis_there - 1) / (4 * m))
    return of_mean, 0.5 * math.log(variance / variance_there) / error


def largest_z() -> float:
    """What no z-score of a whole run exceeds, but for FALSE_ALARMS: Bonferroni's."""
    return statistics.NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * MOST_TESTS))


def moments(numbers: range, run: Callable[[int], nn.Module], found: dict[str, Moments]) -> None:
    for number in numbers:
        for name, parameter in run(number).named_parameters():
            found.setdefault(name, Moments()).add(parameter)


def compare(make: Callable[[], nn.Module], most: int = RUNS[1]) -> dict[str, Any]:
    """Which parameters are drawn, and whether those and the others are the library's."""
    model = make()
    elements = sum(parameter.numel() for parameter in model.parameters())
    theirs: dict[str, Moments] = {}
    ours: dict[str, Moments] = {}

    def library(number: int) -> nn.Module:
        torch.manual_seed(number)
        return make()

    def streams(number: int) -> nn.Module:
        initialize(poison(model), number)
        return model

    runs = min(max(RUNS[0], ELEMENTS // elements), most)
    moments(range(runs), library, theirs)
    drawn = [name for name, sums in theirs.items() if len(sums.seen) > 1]
    smallest = min(
        (parameter.numel() for name, parameter in model.named_parameters() if name in drawn), default=1
    )
    first, runs = runs, max(runs, math.ceil(SAMPLE / smallest))
    moments(range(first, runs), library, theirs)
    moments(range(runs), streams, ours)
    scores = {name: z_scores(ours[name], theirs[name]) for name in drawn}
    return {
        "parameters": len(theirs),
        "elements": elements,
        "runs": runs,
        "drawn": len(drawn),
        "not drawn by us": [name for name in drawn if len(ours[name].seen) < runs],
        "other constants": [
            name for name in theirs if name not in scores and ours[name].seen != theirs[name].seen
        ],
        "misfits": {name: z for name, z in scores.items() if not max(map(abs, z)) < largest_z()},
        "largest z": max((max(map(abs, z)) for z in scores.values()), default=0.0),
    }


# Does anything else change them?


@contextlib.contextmanager
def backwards() -> Iterator[None]:
    """Modules are walked from the last to the first."""
    kept = {name: getattr(nn.Module, name) for name in ("named_children", "named_modules")}

    def turned(walk: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: reversed(list(walk(*args, **options)))

    for name, walk in kept.items():
        setattr(nn.Module, name, turned(walk))
    try:
        yield
    finally:
        for name, walk in kept.items():
            setattr(nn.Module, name, walk)


def registered_backwards(model: nn.Module) -> nn.Module:
    """The model as if its modules had been built from the last to the first, under the same names."""
    for part in list(model.modules()):
        if not isinstance(part, nn.ModuleList | nn.Sequential):  # their order is the network's
            part._modules = dict(reversed(part._modules.items()))
    return model


def in_streams(model: nn.Module, around: contextlib.AbstractContextManager[Any]) -> nn.Module:
    with gt.streams(model, seed=SEED), around:
        model_zoo.recipe(model)
    return model


def changed(model: nn.Module, expected: Digests) -> list[str]:
    """The names of what differs, under any of the names that a parameter has."""
    found = {name: digest(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return [name for name, value in expected.items() if found[name] != value]


def siblings(make: Callable[[], nn.Module]) -> dict[str, Any]:
    model = poison(make())
    report = initialize(model)
    expected = digests(model)
    found: dict[str, Any] = {
        "temporaries": [row.name for row in report if row.written == "temporary"],
        "not written": [row.name for row in report if row.written == "not written"],
        "notes": report.notes,
    }
    initialize(model)
    found["a second run"] = changed(model, expected)
    torch.manual_seed(987654321)
    initialize(model)
    found["another torch.manual_seed"] = changed(model, expected)
    found["the recipe run in streams"] = changed(
        in_streams(poison(model), contextlib.nullcontext()), expected
    )
    found["the recipe backwards"] = changed(in_streams(poison(model), backwards()), expected)
    model = registered_backwards(poison(make()))
    initialize(model)
    found["registered backwards"] = changed(model, expected)
    return found


# Are they the same on several ranks?


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return model_zoo.MODELS[name]()


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """fully_shard of what is repeated, the innermost first, and of the rest; it takes no scalars."""
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList | nn.ModuleDict)]
    for blocks in reversed(lists):
        for block in blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=scalars)
    return fully_shard(model, mesh=mesh, ignored_params=scalars)


def split(model: nn.Module, mesh: Any) -> nn.Module:
    """Tensor parallelism of the projections, as far as they are Linear."""
    plan: dict[str, Any] = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            last = name.rpartition(".")[2]
            if last in COLUMNS:
                plan[name] = ColwiseParallel()
            elif last in ROWS:
                plan[name] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def ways_to_shard(world: int) -> dict[str, Callable[[nn.Module], nn.Module]]:
    if world == 2:
        line = init_device_mesh("cpu", (2,))
        return {"2 ranks": lambda model: shard(model, line)}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    return {
        "hybrid": lambda model: shard(model, square),
        "tensor parallel": lambda model: shard(split(model, square["inner"]), square["outer"]),
    }


def sharded(name: str, place: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """As users do it: meta, shards, memory, and then the weights and buffers."""
    model = place(on_meta(name))
    model.to_empty(device="cpu")
    initialize(poison(model, buffers=True))
    return model


def expectation(name: str) -> tuple[Digests, Digests]:
    """The weights and buffers of one process."""
    model = poison(model_zoo.MODELS[name]())
    initialize(model)
    return digests(model), {name: digest(buffer) for name, buffer in model.named_buffers()}


def attempt(name: str, place: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """What differs from one process, or the error; the same answer on all ranks."""
    model, error = None, ""
    try:
        model = sharded(name, place)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors) or model is None:
        return {"error": next(filter(None, errors))[:400]}
    weights, buffers = expectation(name)
    return {
        "parameters": changed(model, weights),
        "buffers": [
            key for key, buffer in model.named_buffers() if key in buffers and digest(buffer) != buffers[key]
        ],
    }


def rank_of_world(rank: int, world: int, names: list[str], folder: str, queue: Any) -> None:
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(minutes=5), rank=rank, world_size=world
    )
    ways = ways_to_shard(world)
    for name in names:
        queue.put((name, rank, {way: attempt(name, place) for way, place in ways.items()}))
    dist.barrier()
    queue.close()
    queue.join_thread()
    os._exit(0)  # gloo's threads may abort while the interpreter ends


def in_world(world: int, names: list[str], tick: Callable[[], Any]) -> dict[str, Any]:
    """What the ranks found of every model: lists joined, so that one rank's difference is seen."""
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            spawn.Process(target=rank_of_world, args=(rank, world, names, folder, queue), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for _ in range(world * len(names)):
            name, rank, part = answer_of(queue, ranks)
            for way, answer in part.items():
                merge(found.setdefault(name, {}).setdefault(way, {}), answer)
            if rank == 0:
                tick()
        for process in ranks:
            process.join()
    return found


def answer_of(queue: Any, ranks: list[Any]) -> Any:
    while True:
        try:
            return queue.get(timeout=5)
        except Empty:
            if any(process.exitcode for process in ranks):
                raise RuntimeError("a rank ended early; what it wrote is above") from None


def merge(found: dict[str, Any], answer: dict[str, Any]) -> None:
    for key, value in answer.items():
        if isinstance(value, list):
            found[key] = sorted({*found.get(key, []), *value})
        else:
            found[key] = value


# The table


def quiet() -> None:
    """Third parties' warnings and notes are not this script's."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def missing(name: str) -> str | None:
    """Why a model cannot be built here."""
    try:
        model_zoo.MODELS[name]()
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    return None


def check_models(names: list[str], ranks: bool) -> dict[str, Any]:
    from tqdm import tqdm

    found: dict[str, Any] = {}
    there = []
    with tqdm(total=2 * len(names) + len(SQUARES) if ranks else len(names)) as progress:
        for name in names:
            progress.set_description(name)
            why = missing(name)
            if why is None:
                there.append(name)
                make = model_zoo.MODELS[name]
                try:
                    found[name] = compare(make) | {"siblings": siblings(make)}
                except Exception as error:
                    found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            else:
                found[name] = {"missing": why}
            gc.collect()
            progress.update()
        if ranks:
            for world, some in ((2, there), (4, [name for name in SQUARES if name in there])):
                progress.set_description(f"{world} ranks")
                for name, answer in in_world(world, some, progress.update).items() if some else ():
                    found[name]["ranks"] = found[name].get("ranks", {}) | answer
    for name in there:
        found[name]["causes"] = causes(model_zoo.MODELS[name](), found[name])
    return found


SIBLINGS = ("a second run", "another torch.manual_seed", "the recipe run in streams", "the recipe backwards")
RANKS = ("2 ranks", "hybrid", "tensor parallel")


def problems(row: dict[str, Any]) -> dict[str, Any]:
    """Column -> the parameters that are wrong there, or the error."""
    if "error" in row:
        return {"error": row["error"]}
    found = {"recipe": row["not drawn by us"] + row["other constants"], "fit": list(row["misfits"])}
    found["fit"] = [name for name in found["fit"] if name not in found["recipe"]]
    found |= {way: row["siblings"][way] for way in (*SIBLINGS, "registered backwards")}
    for way, answer in row.get("ranks", {}).items():
        found[way] = answer.get("error") or answer["parameters"]
        found[f"buffers, {way}"] = answer.get("buffers")
    return {column: what for column, what in found.items() if what}


def causes(model: nn.Module, row: dict[str, Any]) -> dict[str, str]:
    """Column -> why, in a few words; "?" where it is none of the known reasons."""
    places: dict[torch.Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    tied = {name for names in places.values() if len(names) > 1 for name in names}
    padded = {
        f"{name}.weight"
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None
    }
    found_there = row.get("siblings", {"not written": [], "notes": []})
    unwritten = set(found_there["not written"])
    everything = set(named(model)) if "no recipe of its own" in " ".join(found_there["notes"]) else set[str]()
    reasons = [
        (("recipe", *SIBLINGS), unwritten, "only the constructor writes it, not the recipe"),
        (("recipe", "fit"), everything, "only its constructor has a recipe, of functions outside it"),
        (
            ("the recipe backwards", "registered backwards"),
            tied & padded,
            "tied; who writes last decides on the padding row",
        ),
        (
            ("the recipe backwards", "registered backwards"),
            tied,
            "tied; another of its names is the first",
        ),
        (RANKS, padded, "padding row; the recipe zeroes a copy of a DTensor's row"),
    ]
    found = {}
    for column, what in problems(row).items():
        fitting = [why for columns, names, why in reasons if column in columns and names.issuperset(what)]
        found[column] = fitting[0] if fitting and not isinstance(what, str) else "?"
    return found


def cells(name: str, row: dict[str, Any]) -> list[str]:
    if "missing" in row:
        return [name, row["missing"]]
    if "error" in row:
        return [name, "error"]
    total, drawn = row["parameters"], row["drawn"]
    wrong = len(row["not drawn by us"]) + len(row["other constants"])
    line = [
        name,
        f"{row['elements']:,}",
        f"{total - wrong}/{total}",
        f"{drawn - len(row['misfits'])}/{drawn}",
    ]
    moved = {key for way in (*SIBLINGS, "registered backwards") for key in row["siblings"][way]}
    line.append(f"{total - len(moved)}/{total}")
    for ways in (("2 ranks",), ("hybrid", "tensor parallel")):
        answers = [row["ranks"][way] for way in ways if way in row.get("ranks", {})]
        if not answers:
            line.append("-")
        elif any("error" in answer for answer in answers):
            line.append("error")
        else:
            line.append(f"{total - len({key for one in answers for key in one['parameters']})}/{total}")
    return line


def table(report: dict[str, Any]) -> str:
    titles = ["model", "elements", "recipe", "fit", "siblings", "2 ranks", "2x2"]
    widths = (22, 11, 9, 9, 9, 9, 7)
    lines = heading(report)
    lines += ["".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)), "-" * 80]
    lines[-2] = titles[0].ljust(widths[0]) + lines[-2][widths[0] :]
    wrong = []
    for name, row in report["models"].items():
        row_cells = cells(name, row)
        line = row_cells[0].ljust(widths[0])
        if len(row_cells) == 2:
            line += f"   {row_cells[1]}"
        else:
            line += "".join(f"{cell:>{width}}" for cell, width in zip(row_cells[1:], widths[1:], strict=True))
        lines.append(line)
        if "missing" not in row:
            for column, what in problems(row).items():
                wrong += explain(name, column, what, row["causes"][column])
    lines += ["", *(["Not equal:", *wrong] if wrong else ["Everything is equal."])]
    return "\n".join(lines)


def explain(name: str, column: str, what: Any, cause: str) -> list[str]:
    text = what.splitlines()[0] if isinstance(what, str) else f"{len(what)}: {what[0]}"
    lines = textwrap.wrap(f"{name}, {column}: {cause}", 78)
    return [*(f"  {line}" for line in lines), f"    {text}"[:80]]


def heading(report: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['cpu']}, {report['threads']} threads, {report['date']}, commit {report['commit']}"]
    line = ""
    for word in versions.split(", "):
        if len(line) + len(word) > 76:
            lines.append(line + ",")
            line = ""
        line += (", " if line else "") + word
    return [*lines, line, ""]


def describe() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu.describe_machine()["cpu"],
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {"gpuinit": gpuinit.__version__} | versions,
    }


def commit() -> str | None:
    """The commit of the checkout, with a plus where it has changes."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True)
        change = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.decode().strip() + ("+" if change.stdout.strip() else "")


# The loss before any training


def small_llama() -> Any:
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    return model_zoo.transformers_model("LlamaForCausalLM", sizes | {"vocab_size": VOCABULARY})


def small_bert() -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    return model_zoo.transformers_model("BertForMaskedLM", sizes | {"vocab_size": VOCABULARY})


def by_default_rules(model: nn.Module, seed: int) -> None:
    """The default rules, and after them the usual ones for what they do not cover."""
    usual = [("*norm*.weight", nn.init.ones_), ("*bias", nn.init.zeros_)]
    gt.initialize_(model, seed=seed, rules=[*gt.DEFAULT_RULES, *usual])


def by_plain_recipe(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    model_zoo.recipe(model)


LOSSES = {"llama, 8 layers": small_llama, "bert, 4 layers": small_bert}
WAYS: dict[str, Callable[[nn.Module, int], Any]] = {
    "own recipe, plain torch": by_plain_recipe,
    "own recipe in streams": initialize,
    "default rules": by_default_rules,
}


def losses() -> dict[str, Any]:
    """Model -> way -> the losses of all batches under all seeds."""
    from tqdm import tqdm

    found: dict[str, Any] = {}
    with tqdm(total=len(LOSSES) * len(WAYS) * SEEDS) as progress:
        for title, make in LOSSES.items():
            model = make().eval()
            for way, run in WAYS.items():
                found.setdefault(title, {})[way] = values = []
                for seed in range(SEEDS):
                    run(poison(model), seed)
                    tokens = torch.Generator().manual_seed(seed)
                    for _ in range(BATCHES):
                        batch = torch.randint(VOCABULARY, (4, 128), generator=tokens)
                        with torch.no_grad():
                            values.append(model(input_ids=batch, labels=batch).loss.item())
                    progress.update()
    return found


def loss_table(report: dict[str, Any]) -> str:
    lines = heading(report)
    lines += [f"Loss before training, {SEEDS} seeds, {BATCHES} batches each of 4 x 128 random tokens;"]
    lines += [f"ln {VOCABULARY} = {math.log(VOCABULARY):.3f}", ""]
    for title, ways in report["losses"].items():
        lines += [f"{title:<50}{'mean':>15}{'spread':>15}", "-" * 80]
        for way, values in ways.items():
            lines.append(f"{way:<50}{statistics.mean(values):>15.3f}{statistics.stdev(values):>15.3f}")
        lines.append("")
    return "\n".join(lines)


# Time and memory


def full_gpt2() -> Any:
    with torch.device("meta"):
        return model_zoo.transformers_model("GPT2LMHeadModel", {})


def small_gpt2() -> Any:
    return on_meta("gpt2")


def big_table() -> nn.Module:
    return nn.Embedding(4_000_000, 64, device="meta")


def truncated(std: float, module: nn.Module) -> None:
    nn.init.trunc_normal_(module.weight, std=std)  # of torch's own bounds, -2 and 2


def truncated_in_streams(std: float, module: nn.Module) -> None:
    with gt.streams(module, seed=SEED):
        truncated(std, module)


SPEEDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Callable[[nn.Module], Any]]]] = {
    "GPT-2 of transformers, 124 M parameters": (
        full_gpt2,
        {"own recipe in streams": initialize, "own recipe, plain torch": model_zoo.recipe},
    ),
    **{
        f"table of 4 M x 64, trunc_normal_ std={std}": (
            big_table,
            {"in streams": partial(truncated_in_streams, std), "plain torch": partial(truncated, std)},
        )
        for std in (0.02, 1)
    },
}


def in_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """The module, built on meta, in memory that was written."""
    module = make().to_empty(device="cpu")
    return poison(module, buffers=True)


def peak(case: str, name: str, connection: Any) -> None:
    """Send the peak memory of one call beyond the module."""
    quiet()
    make, contenders = SPEEDS[case]
    warm = small_gpt2 if make is full_gpt2 else lambda: nn.Embedding(4_000, 64, device="meta")
    os.environ["GPUINIT_CPU_ENGINE"] = "numba"  # for a small module too
    contenders[name](in_memory(warm))  # imports, compilers, thread pools
    del os.environ["GPUINIT_CPU_ENGINE"]
    module = in_memory(make)
    connection.send(cpu.peak_beyond(lambda: contenders[name](module)))


def speeds(rounds: int) -> dict[str, Any]:
    from tqdm import tqdm

    found: dict[str, Any] = {}
    with tqdm(total=sum((rounds + 2) * len(contenders) for _, contenders in SPEEDS.values())) as progress:
        for case, (make, contenders) in SPEEDS.items():
            progress.set_description(case)
            times: dict[str, list[float]] = {name: [] for name in contenders}
            module = in_memory(make)
            for number in range(rounds + 1):
                for name, contender in contenders.items():
                    start = time.perf_counter()
                    contender(module)
                    if number:  # the first round is not measured
                        times[name].append(time.perf_counter() - start)
                    progress.update()
            del module
            found[case] = {}
            for name in contenders:
                found[case][name] = {
                    "seconds": statistics.median(times[name]),
                    "all_seconds": times[name],
                    "peak_bytes": cpu.in_new_process(peak, case, name),
                }
                progress.update()
    return found


def speed_table(report: dict[str, Any]) -> str:
    lines = [*heading(report)[:-1], f"medians of {report['rounds']} rounds in turns", ""]
    for case, rows in report["speeds"].items():
        lines += [f"{case:<46}{'time':>12}{'extra memory':>22}", "-" * 80]
        for name, row in rows.items():
            extra = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f} MiB"
            lines.append(f"{name:<46}{1e3 * row['seconds']:>9,.1f} ms{extra:>22}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Real models' own recipes, drawn from streams.")
    parser.add_argument("--models", help="some of them, with commas between: llama,timm vit")
    parser.add_argument("--no-ranks", action="store_true", help="one process only")
    parser.add_argument("--loss", action="store_true", help="instead: the loss before training")
    parser.add_argument("--speed", action="store_true", help="instead: time and peak memory")
    parser.add_argument("--rounds", type=int, default=5, help="of --speed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON files")
    options = parser.parse_args()
    quiet()
    names = options.models.split(",") if options.models else list(model_zoo.MODELS)
    unknown = [name for name in names if name not in model_zoo.MODELS]
    if unknown:
        parser.error(f"--models must be of {', '.join(model_zoo.MODELS)}; got {', '.join(unknown)}")

    report = describe()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.loss:
        report["losses"] = losses()
        write(report, loss_table(report), options.results / "torch-models-loss.json")
    if options.speed:
        report = describe() | {"rounds": options.rounds, "speeds": speeds(options.rounds)}
        slug = re.sub(r"\W+", "-", f"{report['cpu']} {os.cpu_count()} cores").strip("-").lower()
        write(report, speed_table(report), options.results / f"torch-models-speed-{slug}.json")
    if not (options.loss or options.speed):
        report |= {"false alarms": FALSE_ALARMS, "largest z allowed": largest_z()}
        report["models"] = check_models(names, not options.no_ranks)
        write(report, table(report), options.results / "torch-models.json")


def write(report: dict[str, Any], text: str, path: Path) -> None:
    print(text)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
