"""gpuinit checkpoint, verify and fingerprint: models made and proved, and nothing broken left behind."""

from __future__ import annotations

import copy
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes  # noqa: F401, for the safetensors library, which asks NumPy for bfloat16
import numpy as np
import pytest

import gpuinit
from gpuinit import checkpoint, safetensors_file
from gpuinit.__main__ import main

pytest.importorskip("click", reason='click is not installed: pip install "gpuinit[cli]"')
safetensors = pytest.importorskip(
    "safetensors", reason="safetensors is not installed: it is in the extra test"
)

from gpuinit import cli  # noqa: E402, which imports click

MANIFEST = """
[defaults]
dtype = "bfloat16"
in_axis = 1
out_axis = 0

[patterns."*.bias"]
initializer = "zeros"
dtype = "float32"

[tensors]
"embed" = { shape = [1001, 64], initializer = "truncated_normal", stddev = 0.02 }
"layers.{0..2}.up.weight" = [256, 63]
"layers.{0..2}.up.bias" = [255]
"norm" = { shape = [7], initializer = "ones", dtype = "float16" }
"scalar" = { shape = [], dtype = "float64", in_axis = -2, out_axis = -1 }
"none" = { shape = [0, 5], dtype = "float64" }
"""


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    """80 columns without colours, wherever the tests run."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.toml"
    path.write_text(MANIFEST)
    return path


def run(capsys, *arguments: object) -> SimpleNamespace:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return SimpleNamespace(status=stopped.value.code or 0, out=out, err=err)


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def expected() -> dict[str, np.ndarray]:
    """The model of MANIFEST, made by the library."""
    linear = {"in_axis": 1, "out_axis": 0, "dtype": "bfloat16", "device": "cpu", "seed": 5}
    made = {
        "embed": gpuinit.truncated_normal(
            (1001, 64), 0.02, seed=5, name="embed", dtype="bfloat16", device="cpu"
        ),
        "norm": np.ones(7, np.float16),
        "scalar": gpuinit.he_normal((), seed=5, name="scalar", dtype="float64", device="cpu"),
        "none": np.zeros((0, 5)),
    }
    for i in range(3):
        name = f"layers.{i}.up.weight"
        made[name] = gpuinit.he_normal((256, 63), name=name, **linear)
        made[f"layers.{i}.up.bias"] = np.zeros(255, np.float32)
    return made


def read(path: Path) -> dict[str, np.ndarray]:
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].tobytes() == array.tobytes(), name


def test_the_safetensors_library_reads_the_weights_that_the_library_makes(
    device, manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(checkpoint, "WINDOW_BYTES", 1000)
    out = tmp_path / "model.safetensors"
    where = ("--seed", 5, "--device", device.name.removesuffix("-numba").removesuffix("-sim"))
    found = run(capsys, "checkpoint", manifest, "-o", out, *where, "--json")
    assert found.status == 0
    assert json.loads(found.out)["files"] == [str(out)]
    assert json.loads(found.out)["bytes"] == sum(array.nbytes for array in expected().values())
    assert_equal(read(out), expected())
    assert listed(tmp_path) == ["manifest.toml", "model.safetensors"]
    assert run(capsys, "verify", out, manifest, *where).status == 0


ARGUMENTS = """
[patterns."cut.*"]
initializer = "truncated_normal"
stddev = 0.5
mean = 1
upper = 0.25

[tensors]
"wide" = { shape = [999], initializer = "normal", stddev = 0.5, mean = -1, dtype = "float64" }
"cut.one" = { shape = [999], lower = -inf }
"cut.both" = { shape = [999], lower = -0.75, dtype = "bfloat16" }
"range" = { shape = [3, 333], initializer = "uniform", low = 0, high = 0.5 }
"limit" = { shape = [999], initializer = "uniform", limit = 0.5 }
"mean" = { shape = [9, 111], initializer = "variance_scaling", scale = 2, mode = "fan_geo_avg" }
"not cut" = { shape = [999], initializer = "variance_scaling", distribution = "untruncated_normal" }
"""


def test_every_argument_of_the_initializers_is_a_setting(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "WINDOW_BYTES", 1000)
    path, out = tmp_path / "manifest.toml", tmp_path / "model.safetensors"
    path.write_text(ARGUMENTS)
    where = ("--seed", 5, "--device", device.name.removesuffix("-numba").removesuffix("-sim"))
    assert run(capsys, "checkpoint", path, "-o", out, *where).status == 0
    where = {"seed": 5, "device": "cpu"}
    cut = functools.partial(gpuinit.truncated_normal, 999, 0.5, 1, upper=0.25, **where)
    scaled = functools.partial(gpuinit.variance_scaling, **where)
    made = {
        "wide": gpuinit.normal(999, 0.5, -1, name="wide", dtype="float64", **where),
        "cut.one": cut(lower=-math.inf, name="cut.one"),
        "cut.both": cut(lower=-0.75, name="cut.both", dtype="bfloat16"),
        "range": gpuinit.uniform((3, 333), 0, 0.5, name="range", **where),
        "limit": gpuinit.uniform(999, 0.5, name="limit", **where),
        "mean": scaled((9, 111), 2, "fan_geo_avg", name="mean"),
        "not cut": scaled(999, distribution="untruncated_normal", name="not cut"),
    }
    assert_equal(read(out), made)
    path.write_text(ARGUMENTS.replace("mean = 1", "mean = 1.1"))
    found = json.loads(run(capsys, "verify", out, path, "--seed", 5, "--json").out)
    assert [difference["tensor"] for difference in found["differences"]] == ["cut.one", "cut.both"]


def test_the_settings_are_all_arguments_of_all_initializers():
    common = {"shape", "ends", "seed", "name", "dtype", "device", "out", "index"}
    signatures = [inspect.signature(getattr(gpuinit, name)) for name in checkpoint.INITIALIZERS]
    taken = {name for signature in signatures for name in signature.parameters}
    assert set(checkpoint.ARGUMENTS) == taken - common


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("a.toml", "-inf", "+inf"),
        ("a.json", "-Infinity", "Infinity"),
        ("a.json", "-1e999", "1e999"),
    ],
)
def test_bounds_may_be_infinite(tmp_path, name, least, most):
    settings = ("shape", "[9]"), ("initializer", '"truncated_normal"'), ("lower", least), ("upper", most)
    toml = ", ".join(f"{key} = {value}" for key, value in settings)
    as_json = ", ".join(f'"{key}": {value}' for key, value in settings)
    text = {"a.toml": f"[tensors]\na = {{{toml}}}", "a.json": f'{{"tensors": {{"a": {{{as_json}}}}}}}'}
    (tmp_path / name).write_text(text[name])
    (entry,) = checkpoint.read_manifest(tmp_path / name)
    assert entry.arguments == {"lower": -math.inf, "upper": math.inf}
    (made,) = checkpoint.windows(entry, 5, "cpu")
    assert made.tobytes() == gpuinit.normal(9, seed=5, name="a", device="cpu").tobytes()


class SlowDisk(io.BytesIO):
    """Reads what it is given after a while, as a disk does, and may fail in the end."""

    fails_after = math.inf  # bytes

    def write(self, data: bytes | memoryview) -> int:
        time.sleep(0.02)
        if self.tell() + len(data) > self.fails_after:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_window_is_written_as_it_was_made_however_long_that_takes(monkeypatch):
    monkeypatch.setattr(checkpoint, "WINDOW_BYTES", 1024)
    entries = [checkpoint.Entry(name, (9, 256), "float32", "he_normal", {}) for name in "ab"]
    disk, told = SlowDisk(), []
    checkpoint.write_shard(disk, entries, 0, "cpu", told.append)
    made = [gpuinit.he_normal((9, 256), seed=0, name=name, device="cpu").tobytes() for name in "ab"]
    assert disk.getvalue().endswith(b"".join(made))
    assert sum(told) == sum(map(len, made))
    disk.fails_after = len(disk.getvalue()) - 1  # the last window
    disk.seek(0)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.write_shard(disk, entries, 0, "cpu", told.append)


def test_data_of_mixed_dtypes_are_aligned_and_without_holes(manifest, tmp_path):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 0, out, 10**9)
    stored, metadata, claimed_size = safetensors_file.read_model(out)
    assert metadata == {out: {"format": "pt", "gpuinit.seed": "0"}}
    assert claimed_size is None
    places = sorted((tensor.start, tensor.stop) for tensor in stored.values())
    assert all(before[1] == after[0] for before, after in itertools.pairwise(places))
    for tensor in stored.values():
        assert tensor.start % {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[tensor.code] == 0


def test_shards_and_their_index_are_those_of_hugging_face(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert run(capsys, "checkpoint", manifest, "-o", out, "--seed", 5, "--max-shard-size", "66KB").status == 0
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    wanted = expected()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert listed(tmp_path) == sorted(["manifest.toml", "model.safetensors.index.json", *files])
    found: dict[str, np.ndarray] = {}
    for file in files:
        arrays = read(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in arrays)
        large = [array.nbytes for array in arrays.values()]
        assert sum(large) <= 66_000 or len(large) == 1
        found |= arrays
    assert_equal(found, wanted)

    whole = tmp_path / "whole.safetensors"
    assert run(capsys, "checkpoint", manifest, "-o", whole, "--seed", 5).status == 0
    assert run(capsys, "verify", out, manifest, "--seed", 5).status == 0
    prints = [json.loads(run(capsys, "fingerprint", file, "--json").out) for file in (out, whole)]
    assert prints[0] == prints[1]


def test_verify_names_the_first_element_that_differs(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "WINDOW_BYTES", 1000)
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    stored = safetensors_file.read_model(out).tensors
    data = bytearray(out.read_bytes())
    for element in (200 * 63 + 7, 201 * 63):  # of bfloat16: the low bit of each
        data[stored["layers.1.up.weight"].start + 2 * element] ^= 1
    out.write_bytes(data)
    found = run(capsys, "verify", out, manifest, "--seed", 5, "--json")
    (difference,) = json.loads(found.out)["differences"]
    assert found.status == 1
    assert difference["tensor"] == "layers.1.up.weight"
    assert difference["problem"].startswith("first differs at [200, 7]: ")
    value = float(expected()["layers.1.up.weight"][200, 7])
    assert difference["problem"].endswith(f" in the file, {value!r} made")


def test_verify_with_another_seed_says_which_one_the_file_claims(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    found = run(capsys, "verify", out, manifest, "--seed", 6)
    assert found.status == 1
    assert "--seed the file says that it was made with 5, not 6" in " ".join(found.out.split())
    assert f"{out}: not what" in found.out


def change(file: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = file.read_bytes()
    assert data.count(old) == 1
    file.write_bytes(data.replace(old, new))


def test_the_seed_that_a_file_claims_must_agree_even_if_all_tensors_are_equal(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    assert run(capsys, "verify", out, manifest, "--seed", 5).status == 0
    for claimed, shown in ((b"6", "6"), (b" ", "' '")):
        change(out, b'"gpuinit.seed":"5"', b'"gpuinit.seed":"' + claimed + b'"')
        found = run(capsys, "verify", out, manifest, "--seed", 5, "--json")
        assert found.status == 1
        assert json.loads(found.out)["differences"] == [
            {
                "tensor": "--seed",
                "problem": f"the file says that it was made with {shown}, not 5",
            }
        ]
        change(out, b'"gpuinit.seed":"' + claimed + b'"', b'"gpuinit.seed":"5"')
    (tmp_path / "zeros.json").write_text('{"tensors": {"a": {"shape": [2], "initializer": "zeros"}}}')
    zeros = tmp_path / "zeros.safetensors"
    checkpoint.write(checkpoint.read_manifest(tmp_path / "zeros.json"), 5, zeros, 10**9)
    assert run(capsys, "verify", zeros, tmp_path / "zeros.json", "--seed", 6).status == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_seed_that_any_shard_claims_must_agree(manifest, tmp_path, capsys, number):
    checkpoint.write(checkpoint.read_manifest(manifest), 5, tmp_path / "m.safetensors", 66_000)
    index = tmp_path / "m.safetensors.index.json"
    name = f"m-0000{number}-of-00003.safetensors"
    change(tmp_path / name, b'"gpuinit.seed":"5"', b'"gpuinit.seed":"6"')
    found = run(capsys, "verify", index, manifest, "--seed", 5, "--json")
    assert found.status == 1
    (difference,) = json.loads(found.out)["differences"]
    assert difference == {"tensor": "--seed", "problem": f"{name} says that it was made with 6, not 5"}
    found = json.loads(run(capsys, "verify", index, manifest, "--seed", 6, "--json").out)["differences"]
    first = "m-00001-of-00003.safetensors" if number > 1 else "m-00002-of-00003.safetensors"
    assert found[0]["problem"] == f"{first} says that it was made with 5, not 6, as 1 more say"


@pytest.mark.parametrize(
    ("size", "status"),
    [
        (lambda size: size, 0),
        (float, 0),
        (lambda size: size + 1, 1),
        (str, 1),
        (lambda size: 0, 1),
        (lambda size: None, 0),
    ],
)
def test_the_size_that_an_index_claims_must_agree(manifest, tmp_path, capsys, size, status):
    checkpoint.write(checkpoint.read_manifest(manifest), 5, tmp_path / "m.safetensors", 66_000)
    path = tmp_path / "m.safetensors.index.json"
    index = json.loads(path.read_text())
    total = index["metadata"]["total_size"]
    index["metadata"]["total_size"] = size(total)
    path.write_text(json.dumps(index))
    found = run(capsys, "verify", path, manifest, "--seed", 5, "--json")
    assert found.status == status
    problem = f"is {size(total)!r} in the index, and {total} in its files"
    differences = [{"tensor": "total_size", "problem": problem}] if status else []
    assert json.loads(found.out)["differences"] == differences


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"gpuinit.seed": "0", "format": "flax"}])
def test_metadata_that_tells_of_no_other_seed_is_left_aside(tmp_path, capsys, metadata):
    (tmp_path / "a.json").write_text('{"tensors": {"a": {"shape": [2], "initializer": "zeros"}}}')
    header = json.dumps({"__metadata__": metadata, "a": tensor()}).encode()
    for blanks in (b"", b" " * 7):
        file = stored(tmp_path / "m.safetensors", header + blanks, bytes(8))
        assert run(capsys, "verify", file, tmp_path / "a.json").status == 0


def test_the_screens_of_a_large_model_are_80_columns_wide_and_24_lines_high(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.json").write_text('{"tensors": {"layers.{0..99}.attention.query.weight": [8, 8]}}')
    shown = [run(capsys, "checkpoint", "m.json", "-o", "model.safetensors", "--max-shard-size", "10kB")]
    shown += [run(capsys, "verify", "model.safetensors", "m.json", "--seed", seed) for seed in (0, 1)]
    assert [found.status for found in shown] == [0, 0, 1]
    for found in shown:
        lines = found.out.splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) <= 24
    said = "model.safetensors: names, shapes, dtypes and all bytes of the tensors are equal\n"
    assert f"{said}100 tensors, 25.60 kB, " in shown[1].out
    assert "made with 0, not 1" in shown[2].out
    assert "and 93 more; --json has them all" in shown[2].out


def test_verify_finds_missing_and_additional_tensors_and_other_shapes(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    other = tmp_path / "other.toml"
    other.write_text(MANIFEST.replace("{0..2}.up.weight", "{0..3}.up.weight").replace("[255]", "[254]"))
    other.write_text(other.read_text().replace('"norm"', '"norms"'))
    found = json.loads(run(capsys, "verify", out, other, "--seed", 5, "--json").out)["differences"]
    problems = {difference["tensor"]: difference["problem"] for difference in found}
    assert problems["norm"] == "is in the file and not in the manifest"
    assert problems["norms"] == problems["layers.3.up.weight"] == "is in the manifest and not in the file"
    assert problems["layers.0.up.bias"] == "is float32 (255,) in the file, and float32 (254,) in the manifest"
    assert len(problems) == 6


def test_a_safetensors_file_or_index_is_a_manifest(manifest, tmp_path, capsys):
    entries = checkpoint.read_manifest(manifest)
    like = tmp_path / "like.safetensors"
    checkpoint.write(entries, 5, like, 66_000)
    checkpoint.write(entries, 5, tmp_path / "one.safetensors", 10**9)
    header = tmp_path / "header.safetensors"  # as if only its beginning had been fetched
    header.write_bytes((tmp_path / "one.safetensors").read_bytes()[:2000])
    shapes = {entry.name: (entry.shape, entry.dtype) for entry in entries}
    for file in ("like.safetensors.index.json", "like.safetensors", "one.safetensors", "header.safetensors"):
        found = checkpoint.read_manifest(tmp_path / file)
        assert {entry.name: (entry.shape, entry.dtype) for entry in found} == shapes
        assert {entry.initializer for entry in found} == {"he_normal"}
    patterns = {"*.bias": {"initializer": "skip"}, "n*": {"dtype": "float16"}}
    (tmp_path / "new.json").write_text(json.dumps({"like": "one.safetensors", "patterns": patterns}))
    found = checkpoint.read_manifest(tmp_path / "new.json")
    assert {entry.name for entry in found} == {name for name in shapes if not name.endswith(".bias")}
    assert {entry.dtype for entry in found if entry.name.startswith("n")} == {"float16"}
    (tmp_path / "new.json").write_text('{"like": "one.safetensors", "defaults": {"dtype": "float64"}}')
    assert {entry.dtype for entry in checkpoint.read_manifest(tmp_path / "new.json")} == {"float64"}


def test_settings_override_one_another_in_the_order_that_the_page_gives(tmp_path):
    tensors = {"a": {"shape": [2], "dtype": "float64"}, "b": [2], "c": [2]}
    patterns = {"[ab]": {"dtype": "float16"}, "b": {"dtype": "float32"}}
    given = {"defaults": {"dtype": "bfloat16"}, "patterns": patterns, "tensors": tensors}
    (tmp_path / "a.json").write_text(json.dumps(given))
    found = {entry.name: entry.dtype for entry in checkpoint.read_manifest(tmp_path / "a.json")}
    assert found == {"a": "float64", "b": "float32", "c": "bfloat16"}


def test_the_fingerprint_is_what_its_docstring_says(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    total = hashlib.sha256()
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    for name, array in sorted(expected().items()):
        row = [name, codes[array.dtype.name], list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
        total.update(json.dumps(row).encode() + b"\n")
    found = run(capsys, "fingerprint", out)
    assert found.out.splitlines()[-1] == f"{total.hexdigest()}  {out}"
    assert all(len(line) <= 80 for line in found.out.splitlines()[:-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tensors", "the manifest must be TOML, got"),
        ("", "a manifest must name a tensor under tensors, or a file under like, got none"),
        ("[tensor]\na = [1]", "the keys must be like, defaults, patterns and tensors, got tensor"),
        (
            "[tensors]\na = [-1]",
            "tensor 'a': shape must be an integer or a sequence of integers >= 0, got [-1]",
        ),
        ("[tensors]\na = {dtype = 'float32'}", "tensor 'a': must have a shape, got"),
        ("[tensors]\na = {shape = [2], dtype = 'int8'}", "tensor 'a': dtype must be one of float32, "),
        ("[tensors]\na = {shape = [2], in_axes = 0}", "tensor 'a': a setting must be one of dtype, init"),
        (
            "[tensors]\na = {shape = [2], initializer = 'he'}",
            "tensor 'a': initializer must be one of glorot_",
        ),
        (
            "[tensors]\na = {shape = [2], stddev = 1}",
            "tensor 'a': he_normal takes in_axis, out_axis, batch_axis",
        ),
        ("[tensors]\na = {shape = [2], in_axis = 1}", "tensor 'a': in_axis must be an axis or a sequence of"),
        (
            "[tensors]\na = [2]\n[patterns.b]",
            "pattern 'b' must match a tensor, got none that it does. Correct",
        ),
        ("[tensors]\na = [2]\n[patterns.a]\nx = 1", "pattern 'a': a setting must be one of"),
        ("[tensors]\n'a{0..1}' = [2]\na1 = [2]", "tensor 'a1' must be given once, got it again in 'a1'"),
        ("[tensors]\n'a{1..0}' = [2]", "tensor 'a{1..0}': a range must not fall, got 1..0"),
        ("[tensors]\n__metadata__ = [2]", "tensor '__metadata__': this name must not be used"),
        ("like = 'manifest.toml'", "a safetensors file must begin with its header, got another file"),
        (
            "[tensors]\na.b = [2]",
            "tensor 'a': must have a shape, got {'b': [2]}. In TOML a name with dots must be",
        ),
        (
            "[tensors]\n'a{0..999}{0..999}{0..1}' = [2]",
            "tensor 'a{0..999}{0..999}{0..1}': must be at most 1000000 tensors, got 2000000",
        ),
        ("like = ''", "manifest.toml: like must be the path of a file, got ''"),
        (
            "[tensors]\na = {shape = [2], initializer = 'truncated_normal', upper = -3}",
            "tensor 'a': upper must be at least lower, got lower -2.0 and upper -3.0. Set it for this tensor",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'truncated_normal', lower = nan}",
            "tensor 'a': lower must be a number, got nan",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'normal', mean = inf}",
            "tensor 'a': mean must be a finite number, got inf",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'normal', mean = true}",
            "tensor 'a': mean must be a finite number, got True",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'normal', mean = 7e4, dtype = 'float16'}",
            "tensor 'a': mean must leave the weights finite in float16, got mean 70000.0",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'normal', stddev = 1e-9, dtype = 'float16'}",
            "tensor 'a': stddev must leave weights other than 0 in float16, whose least is 6e-08, got stddev",
        ),
        (
            "[tensors]\na = {shape = [2], dtype = '(1,'}",
            "tensor 'a': dtype must be one of float32, float16, bfloat16, float64, got '(1,'",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'uniform', low = 0.0}",
            "tensor 'a': uniform must be given one limit, or low and high, got low=0.0",
        ),
        (
            "[tensors]\na = {shape = [2], initializer = 'normal', lower = 0.0}",
            "tensor 'a': normal takes stddev, mean, got 'lower'. Take it out",
        ),
        ("like = 'no.safetensors'", "no.safetensors: No such file or directory"),
    ],
)
def test_a_bad_manifest_is_named_with_its_entry_and_leaves_nothing(tmp_path, capsys, text, message):
    path = tmp_path / "manifest.toml"
    path.write_text(text)
    found = run(capsys, "checkpoint", path, "-o", tmp_path / "model.safetensors")
    assert found.status == 2
    assert found.err.startswith("gpuinit: ")
    assert "manifest.toml: " in found.err or "like" in text
    assert message in found.err
    assert listed(tmp_path) == ["manifest.toml"]


def test_a_key_that_comes_twice_in_json_is_an_error(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"tensors": {"a": [1], "a": [2]}}')
    with pytest.raises(ValueError, match="the manifest must be JSON, got the key 'a' twice"):
        checkpoint.read_manifest(path)


def test_a_dtype_of_null_is_not_numpys_default(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text('{"defaults": {"dtype": null}, "tensors": {"a": [1]}}')
    with pytest.raises(ValueError, match=r"tensor 'a': dtype must be one of float32, .* got None"):
        checkpoint.read_manifest(path)


def test_json_that_nests_too_deeply_is_named(tmp_path, capsys):
    path = tmp_path / "manifest.json"
    path.write_text("[" * 100_000)
    found = run(capsys, "checkpoint", path, "-o", tmp_path / "m.safetensors")
    assert found.err.startswith(f"gpuinit: {path}: the manifest must be JSON, got")


@pytest.mark.parametrize("taken", ["m.safetensors", "m.safetensors.index.json", "m.safetensors.partial"])
def test_what_is_there_is_never_overwritten(manifest, tmp_path, capsys, taken):
    (tmp_path / taken).write_text("precious")
    found = run(capsys, "checkpoint", manifest, "-o", tmp_path / "m.safetensors")
    assert found.status == 2
    assert f"{tmp_path / taken} exists" in found.err
    assert "elete it" in found.err
    assert (tmp_path / taken).read_text() == "precious"
    assert listed(tmp_path) == sorted(["manifest.toml", taken])


def test_a_shard_that_is_there_is_never_overwritten(manifest, tmp_path, capsys):
    """Nor are old and new shards mixed."""
    taken = tmp_path / "m-00002-of-00003.safetensors"
    taken.write_text("precious")
    given = (manifest, "-o", tmp_path / "m.safetensors", "--max-shard-size", "66KB")
    found = run(capsys, "checkpoint", *given)
    assert found.status == 2
    assert f"{taken} exists already. Delete it" in found.err
    assert taken.read_text() == "precious"
    assert listed(tmp_path) == [taken.name, "manifest.toml"]


@pytest.mark.parametrize("taken", ["m.safetensors", "m.safetensors.partial"])
def test_a_link_that_leads_nowhere_is_not_replaced(manifest, tmp_path, capsys, taken):
    (tmp_path / taken).symlink_to("nowhere")
    found = run(capsys, "checkpoint", manifest, "-o", tmp_path / "m.safetensors")
    assert found.status == 2
    assert f"{tmp_path / taken} exists" in found.err
    assert listed(tmp_path) == sorted([taken, "manifest.toml"])


@pytest.mark.parametrize("shards", [10**9, 66_000])
def test_a_file_that_appears_meanwhile_is_not_overwritten(manifest, tmp_path, monkeypatch, shards):
    other = tmp_path / "m.safetensors"
    real = checkpoint.header_of

    def meanwhile(*given: object) -> bytes:
        other.write_text("another's")
        return real(*given)

    monkeypatch.setattr(checkpoint, "header_of", meanwhile)
    with pytest.raises(FileExistsError, match="exists already") as raised:
        checkpoint.write(checkpoint.read_manifest(manifest), 0, other, shards)
    assert other.read_text() == "another's"
    (note,) = raised.value.__notes__  # what was made is kept
    assert note.startswith("All is written: to finish, take .partial off the name of ")
    made = [file for file in tmp_path.iterdir() if file.suffix == ".partial"]
    assert all(str(file) in note for file in made)
    assert len(made) == (1 if shards == 10**9 else 4)
    other.unlink()
    for file in made:
        file.rename(file.with_suffix(""))
    entries = checkpoint.read_manifest(manifest)
    assert checkpoint.verify(safetensors_file.read_model(other), entries, 0) == []


def test_the_index_comes_into_place_after_all_its_shards(manifest, tmp_path, monkeypatch):
    """So that a writer that is killed meanwhile leaves no index of shards that are not there."""
    moved = []
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda file, to: (moved.append(to.name), real(file, to)))
    checkpoint.write(checkpoint.read_manifest(manifest), 0, tmp_path / "m.safetensors", 66_000)
    assert moved.pop(0).startswith(".gpuinit-")  # tried first
    assert moved == [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["m.safetensors.index.json"]


def test_a_disk_that_cannot_sync_a_folder_is_no_fault_and_one_that_fails_is(
    manifest, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "m.safetensors"
    for error, status in ((errno.EIO, 2), (errno.EINVAL, 0)):
        steps = iter([1, 0])  # the file's data, then the folder
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", stop_at(steps, OSError(error, os.strerror(error)), os.fsync))
            assert run(capsys, "checkpoint", manifest, "-o", out).status == status
        assert out.exists() is (status == 0)
    assert run(capsys, "verify", out, manifest).status == 0


def test_a_temporary_file_that_appears_meanwhile_is_not_touched(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_place", lambda *_: None)
    other = tmp_path / "m.safetensors.partial"
    other.write_text("another writer's")
    with pytest.raises(FileExistsError):
        checkpoint.write(checkpoint.read_manifest(manifest), 0, tmp_path / "m.safetensors", 10**9)
    assert other.read_text() == "another writer's"


def test_a_file_that_is_cut_or_no_safetensors_is_named(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    out.write_bytes(out.read_bytes()[:-1])
    found = run(capsys, "verify", out, manifest)
    assert found.status == 2
    assert "It is cut or damaged: make or copy it again" in found.err
    out.write_bytes(b"x" * 100)
    assert f"{out}: a safetensors file must begin with its header" in run(capsys, "fingerprint", out).err


def stored(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header, as JSON or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(**given: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **given}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "'[' at character 0, not '{'"),
        ({"a": 1}, "the tensor 1, not an object"),
        (b"[" * 100_000, "'[' at character 0, not '{'"),
        (b'{"a":' + b"[" * 100_000, "RecursionError"),
        (b'{"a": 1, "a": 2}', "the tensor 1, not an object"),
        ({"__metadata__": [1], "a": tensor()}, "metadata [1], not an object of strings"),
        ({"__metadata__": {"gpuinit.seed": 3}, "a": tensor()}, "metadata (('gpuinit.seed', 3),), not"),
        ({"a": tensor(dtype=5)}, "dtype 5, not one of F64, "),
        ({"a": tensor(shape=[3])}, "offsets 0 and 8 for shape (3,) of F32"),
        ({"a": tensor(shape=[2**62, 2])}, "offsets 0 and 8 for shape (4611686018427387904, 2) of F32"),
        ({"a": tensor(shape=["x" * 10**6])}, "xxx..., not integers from 0 to 2**64 - 1"),
        ({"a": tensor(data_offsets=[0.0, 8.0])}, "data_offsets [0.0, 8.0], not two integers"),
        ({"a": tensor(data_offsets=[-8, 0])}, "data_offsets [-8.0, 0], not two integers"),
        ({"a": tensor(data_offsets=[8, 0])}, "offsets 8 and 0"),
        ({"a": tensor(data_offsets=[8, 16])}, "data from 8 on after those to 0"),
        ({"a": tensor(), "b": tensor()}, "data from 0 on after those to 8"),
        (json.dumps({"a": tensor()}).encode("utf-16"), "UnicodeDecodeError: "),
        (json.dumps({"a": tensor(x=math.nan)}).encode(), "NaN, which is not JSON"),
        (json.dumps({"\ud800": tensor()}).encode(), "half of a surrogate pair, \\ud8"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, capsys, header, message):
    file = stored(tmp_path / "m.safetensors", header, bytes(16))
    (tmp_path / "a.json").write_text('{"tensors": {"a": [2]}}')
    for command in (("verify", file, tmp_path / "a.json"), ("fingerprint", file)):
        found = run(capsys, *command)
        assert found.status == 2
        assert found.err.startswith(f"gpuinit: {file}: the header must be that of a safetensors file, got")
        assert message in found.err


@pytest.mark.parametrize("length", [2**63, 100_000_001, 99, 0])
def test_a_header_that_is_longer_than_the_file_or_the_format_allows_is_refused(tmp_path, capsys, length):
    file = tmp_path / "m.safetensors"
    with file.open("wb") as out:
        out.write(length.to_bytes(8, "little") + b"{}")
        if length == 100_000_001:
            out.truncate(8 + length)  # it is there, and takes no room on the disk
    found = run(capsys, "fingerprint", file)
    assert found.status == 2
    assert "a safetensors file must begin with its header, got another file" in found.err


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../m/1.safetensors"}}', "a file must be named without a folder, got '../m/1"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "a file must be named without a folder, got '/etc/passwd'"),
        ('{"weight_map": {"a": ""}}', "a file must be named without a folder, got ''"),
        ('{"weight_map": {"a": ".."}}', "a file must be named without a folder, got '..'"),
        ('{"weight_map": {"a": 1}}', "a file must be named without a folder, got 1"),
        ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "the key 'a' twice"),
        ('{"weight_map": ["1.safetensors"]}', "an index must be JSON with a weight_map"),
        (
            '{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}',
            "each tensor must be in one file, got 'a' in {folder}/2.safetensors again",
        ),
        (
            '{"weight_map": {"a": "1.safetensors"}}',
            "the index and its files must name the same tensors, got 'b' in one",
        ),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, capsys, index, message):
    one = {"a": tensor(), "b": tensor(shape=[0], data_offsets=[8, 8])}
    stored(tmp_path / "1.safetensors", one, bytes(8))
    stored(tmp_path / "2.safetensors", {"a": tensor()}, bytes(8))
    (tmp_path / "m.safetensors.index.json").write_text(index)
    found = run(capsys, "fingerprint", tmp_path / "m.safetensors")
    assert found.status == 2
    assert message.replace("{folder}", str(tmp_path)) in found.err


def test_an_index_is_compared_with_its_files_in_linear_time(tmp_path, monkeypatch):
    """Names are looked up: 2000 that both have, and 2000 more that the index alone has."""

    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    there = {f"there.{number}": tensor(data_offsets=[8 * number, 8 * number + 8]) for number in range(2000)}
    stored(tmp_path / "1.safetensors", there, bytes(8 * 2000))
    places = dict.fromkeys([*there, *(f"missing.{number}" for number in range(2000))], "1.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    real = safetensors_file.unique

    def named(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {key if key == "weight_map" else Name(key): value for key, value in real(pairs).items()}

    monkeypatch.setattr(safetensors_file, "unique", named)
    with pytest.raises(ValueError, match=r"must name the same tensors, got 'missing\.0' in one"):
        safetensors_file.read_model(tmp_path / "m.safetensors")
    assert Name.compared < 10 * 2000


def test_bytes_are_compared_and_not_values(tmp_path, capsys):
    """Minus zero equals zero, and a NaN equals nothing, as values."""
    (tmp_path / "a.json").write_text('{"tensors": {"a": {"shape": [], "initializer": "zeros"}}}')
    scalar = tensor(shape=[], data_offsets=[0, 4])
    for bits, shown in ((0, ""), (0x80000000, "-0.0"), (0x7FC00001, "nan"), (1, "1.401298464324817e-45")):
        file = stored(tmp_path / "m.safetensors", {"a": scalar}, bits.to_bytes(4, "little"))
        found = json.loads(run(capsys, "verify", file, tmp_path / "a.json", "--json").out)
        problems = [difference["problem"] for difference in found["differences"]]
        assert problems == ([f"first differs at []: {shown} in the file, 0.0 made"] if bits else [])


def test_another_dtype_of_the_same_size_differs(manifest, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    checkpoint.write(checkpoint.read_manifest(manifest), 5, out, 10**9)
    out.write_bytes(out.read_bytes().replace(b'"BF16"', b'"I16" ', 1))
    (difference,) = json.loads(run(capsys, "verify", out, manifest, "--seed", 5, "--json").out)["differences"]
    assert difference["problem"].startswith("is I16 (")


def test_any_name_can_be_written_read_and_shown(tmp_path, capsys, monkeypatch):
    names = ["é中😀", "a" * 5000, "", "with space/slash\\", "[red]x[/red]", "line\nbreak", "\x1b[2J"]
    (tmp_path / "a.json").write_text(json.dumps({"tensors": {name: [2] for name in names}}))
    out = tmp_path / "m.safetensors"
    assert run(capsys, "checkpoint", tmp_path / "a.json", "-o", out).status == 0
    assert_equal(
        read(out), {name: gpuinit.he_normal((2,), seed=0, name=name, device="cpu") for name in names}
    )
    assert run(capsys, "verify", out, tmp_path / "a.json").status == 0
    shown = run(capsys, "fingerprint", out).out
    for text in ("é中😀", "[red]x[/red]", "line\\nbreak", "\\x1b[2J"):
        assert text in shown
    assert "\x1b" not in shown
    for columns in ("0", "5", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = run(capsys, "fingerprint", out).out.splitlines()
        assert max(map(len, lines[:-1])) <= 40
        assert any(line.startswith("é中😀") for line in lines)


def test_a_stream_that_takes_only_ascii_gets_escapes():
    assert cli.readable("é\ud800\x1b", "ascii") == "\\xe9\\ud800\\x1b"
    assert cli.readable("é\ud800\x1b", "utf-8") == "é\\ud800\\x1b"


@pytest.mark.parametrize("command", ["checkpoint", "verify", "fingerprint"])
def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch, command):
    """One tensor of 32 MiB, and as much again in 512 of 64 KiB, through windows of 1 MiB."""
    monkeypatch.setattr(checkpoint, "WINDOW_BYTES", 2**20)
    (tmp_path / "a.json").write_text('{"tensors": {"one": [2048, 4096], "many.{0..511}": [128, 128]}}')
    entries = checkpoint.read_manifest(tmp_path / "a.json")
    out = tmp_path / "m.safetensors"
    if command != "checkpoint":
        checkpoint.write(entries, 0, out, 10**9, "cpu")
    gpuinit.he_normal((512, 512), device="cpu")  # what is made once
    tracemalloc.start()
    try:
        if command == "checkpoint":
            checkpoint.write(entries, 0, out, 10**9, "cpu")
        elif command == "verify":
            assert checkpoint.verify(safetensors_file.read_model(out), entries, 0, "cpu") == []
        else:
            safetensors_file.fingerprint(safetensors_file.read_model(out).tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 * 2**20  # 14 MiB of it the sampler's scratch


def test_memory_is_that_of_a_window_whatever_the_size():
    large = checkpoint.Entry("a", (10**6, 10**6), "float32", "he_normal", {})
    for made, window in enumerate(checkpoint.windows(large, 0, "cpu")):
        assert window.nbytes <= checkpoint.WINDOW_BYTES
        if made == 1:
            break
    assert checkpoint.WINDOW_BYTES <= 2**27


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (5, 1, 3), (2, 0, 3), (4, 11)])
@pytest.mark.parametrize("most", [1, 2, 5, 12, 1000])
def test_cuts_follow_one_another_and_cover_the_shape(shape, most):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    found = [(whole[index], part) for index, part in checkpoint.cut(shape, most)]
    assert all(piece.shape == part and piece.size <= most for piece, part in found)
    assert [i for piece, _ in found for i in piece.reshape(-1)] == list(range(whole.size))


def stop_at(calls: Iterator[int], stopping: BaseException, real: Callable) -> Callable:
    """The real function, but for the call at which the calls of all such functions have come to 0."""

    def call(*arguments: object, **keywords: object) -> object:
        if next(calls, None) == 0:
            raise stopping
        return real(*arguments, **keywords)

    return call


@pytest.mark.parametrize("shards", [10**9, 66_000])
@pytest.mark.parametrize("stopping", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_ctrl_c_at_any_step_leave_nothing_or_all(
    manifest, tmp_path, capsys, monkeypatch, stopping, shards
):
    """Stopped at every call that the writer makes of the system, one after another."""
    kept = 0
    for step in range(40):
        count = functools.partial(stop_at, iter(range(step, -1, -1)), copy.copy(stopping))
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "header_of", count(checkpoint.header_of))
            patched.setattr(os, "fsync", count(os.fsync))
            patched.setattr(Path, "rename", count(Path.rename))
            patched.setattr(checkpoint, "windows", count(checkpoint.windows))
            size = ("--max-shard-size", shards)
            found = run(capsys, "checkpoint", manifest, "-o", tmp_path / "m.safetensors", *size)
        if found.status == 0:
            break
        assert found.status == (130 if isinstance(stopping, KeyboardInterrupt) else 2)
        left = listed(tmp_path)
        left.remove("manifest.toml")
        if "Nothing was left behind." in found.err:
            assert left == [], step
        elif "All files are in place" in found.err:
            assert not any(name.endswith(".partial") for name in left)
        else:  # moved into place in part, or not at all: all of it is there
            assert "All is written: to finish, take .partial off the name of" in found.err
            assert any(name.endswith(".partial") for name in left)
        if left:
            assert isinstance(stopping, OSError)
            kept += 1
            for file in tmp_path.glob("*.partial"):
                file.rename(file.with_suffix(""))
            assert run(capsys, "verify", tmp_path / "m.safetensors", manifest).status == 0
            for name in set(listed(tmp_path)) - {"manifest.toml"}:
                (tmp_path / name).unlink()
    assert step >= 16  # ten tensors, a header, four fsyncs and two renames at least
    files = 1 if shards == 10**9 else 4
    assert kept == (0 if isinstance(stopping, KeyboardInterrupt) else files + 1)  # their renames, and a sync


BIG = '{"tensors": {"w{0..31}": {"shape": [1024, 1024]}}}'  # 128 MiB

WRITER = """
import time
from gpuinit import __main__, checkpoint

written, put = 0, checkpoint.put

def pause_in_the_middle(out, data):
    global written
    if written < 2**26 <= written + len(data):
        time.sleep(2)
    written += len(data)
    return put(out, data)

checkpoint.put = pause_in_the_middle
__main__.main()
"""


def start_writer(folder: Path, shard: str = "5GB", before: Sequence[str] = ()) -> subprocess.Popen:
    (folder / "big.json").write_text(BIG)
    command = [*before, sys.executable, "-c", WRITER, "checkpoint", "big.json", "-o", "model.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent)}
    return subprocess.Popen(
        [*command, "--max-shard-size", shard],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_half(writer: subprocess.Popen, folder: Path) -> None:
    """Until the writer is in the middle, where it makes a pause.

    Of the model's files alone: one that it tries the folder with may be gone before its size is asked.
    """
    while sum(file.stat().st_size for file in folder.glob("model*.partial")) < 2**25:
        assert writer.poll() is None, writer.stderr.read()
        time.sleep(0.005)


@pytest.mark.parametrize("shard", ["5GB", "10MB"])
def test_a_writer_that_is_killed_leaves_no_file_that_passes_for_a_model(tmp_path, capsys, shard):
    writer = start_writer(tmp_path, shard)
    wait_for_half(writer, tmp_path)
    writer.kill()
    writer.communicate()
    left = listed(tmp_path)
    assert [name for name in left if not name.endswith(".partial")] == ["big.json"]
    found = run(capsys, "checkpoint", tmp_path / "big.json", "-o", tmp_path / "model.safetensors")
    assert found.status == 2
    assert "If none is running, delete it" in found.err
    for name in tmp_path.glob("*.partial"):
        name.unlink()
    found = run(capsys, "checkpoint", tmp_path / "big.json", "-o", tmp_path / "model.safetensors")
    assert found.status == 0
    verified = run(capsys, "verify", tmp_path / "model.safetensors", tmp_path / "big.json")
    assert verified.status == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_writer_that_is_interrupted_cleans_up(tmp_path, name):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name}")
    writer = start_writer(tmp_path)
    wait_for_half(writer, tmp_path)
    writer.send_signal(number)
    _, err = writer.communicate()
    assert writer.returncode == 128 + number
    assert err == "gpuinit: stopped. Nothing was left behind.\n"
    assert listed(tmp_path) == ["big.json"]


@pytest.mark.skipif(shutil.which("nohup") is None, reason="there is no nohup")
def test_a_writer_that_is_to_outlive_its_terminal_does(tmp_path):
    writer = start_writer(tmp_path, before=["nohup"])
    wait_for_half(writer, tmp_path)
    writer.send_signal(signal.SIGHUP)
    writer.communicate()
    assert writer.returncode == 0
    assert (tmp_path / "model.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a disk of 64 MiB: there is no mount")
    if done.returncode:
        pytest.skip(f"a disk of 64 MiB: mount needs root ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("shard", ["5GB", "10MB"])
def test_a_disk_that_is_too_small_or_runs_full_is_left_as_it_was(small_disk, capsys, monkeypatch, shard):
    (small_disk / "big.json").write_text(BIG)
    given = (small_disk / "big.json", "-o", small_disk / "model.safetensors", "--max-shard-size", shard)
    found = run(capsys, "checkpoint", *given)
    assert found.status == 2
    assert "MB free, and model.safetensors takes 134.22 MB" in found.err

    plenty = SimpleNamespace(free=10**12)  # as if another process took the room meanwhile
    monkeypatch.setattr("gpuinit.checkpoint.shutil.disk_usage", lambda folder: plenty)
    found = run(capsys, "checkpoint", *given)
    assert found.status == 2
    assert "No space left on device. Free some of the disk, or choose another" in found.err
    assert "Nothing was left behind." in found.err
    assert listed(small_disk) == ["big.json"]


@pytest.mark.parametrize("size", ["0", "5XB", "x", "-1"])
def test_a_bad_shard_size_is_named(manifest, tmp_path, capsys, size):
    found = run(capsys, "checkpoint", manifest, "-o", tmp_path / "m.safetensors", f"--max-shard-size={size}")
    assert f"--max-shard-size must be a size such as 5GB, 500MB or 2GiB, got '{size}'" in found.err
    found = run(capsys, "verify", tmp_path / "m.safetensors", manifest, "--seed", -1)
    assert "seed must be None or an integer in [0, 2**64), got -1" in found.err


def test_a_shard_size_may_be_of_any_length():
    assert cli.parse_size("9" * 400) == int("9" * 400)
    assert cli.parse_size("1.000000001 GB") == 10**9 + 1


@pytest.mark.filterwarnings("error")
def test_the_fallback_is_told_in_one_line(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gpuinit.devices.find_cuda_problem", lambda _: "there is no CUDA device")
    line = "gpuinit: CUDA cannot be used, so the same weights are made on the CPU: there is no CUDA device"
    out = tmp_path / "m.safetensors"
    monkeypatch.setattr("gpuinit.devices.fallback_warned", False)
    found = run(capsys, "checkpoint", manifest, "-o", out, "--device", "cuda")
    assert (found.status, found.err) == (2, f"{line}. Nothing was left behind.\n")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        found = run(capsys, "checkpoint", manifest, "-o", out, "--device", "cuda")
    assert (found.status, found.err) == (0, f"{line}.\n")


def test_an_engine_that_is_not_installed_is_named(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GPUINIT_CPU_ENGINE", "numba")
    monkeypatch.setattr("gpuinit.backends.cpu.numba_problem", lambda: "Numba is not installed")
    found = run(capsys, "checkpoint", manifest, "-o", tmp_path / "m.safetensors", "--device", "cpu")
    assert (found.status, listed(tmp_path)) == (2, ["manifest.toml"])
    assert "gpuinit: GPUINIT_CPU_ENGINE is numba, but Numba is not installed. Nothing was" in found.err


def test_a_log_has_no_progress_bar_whatever_the_colours(tmp_path):
    (tmp_path / "a.json").write_text('{"tensors": {"a": [2]}}')
    command = [sys.executable, "-m", "gpuinit", "checkpoint", "a.json", "-o", "m.safetensors", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent), "FORCE_COLOR": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["tensors"] == 1
