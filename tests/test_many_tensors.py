"""Models of many tensors are read, checked and shown in linear time and little memory, and it is seen."""

from __future__ import annotations

import fnmatch
import inspect
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

import gpuinit
from gpuinit import checkpoint, safetensors_file

pytest.importorskip("click", reason='click is not installed: pip install "gpuinit[cli]"')

from gpuinit import cli

MANY = 5000


def write_many(path: Path, names: list[str]) -> Path:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * len(names)))
    return path


def names_of(count: int) -> list[str]:
    return [f"model.layers.{i:06}.attention.weight" for i in range(count)]


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    return write_many(tmp_path / "one.safetensors", names_of(MANY))


@pytest.fixture
def four_files(tmp_path: Path) -> Path:
    """Which are dealt the tensors in turn, so that no two neighbours are in one file."""
    places = {}
    for number in range(4):
        names = names_of(MANY)[number::4]
        file = write_many(tmp_path / f"{number}.safetensors", names)
        places |= dict.fromkeys(names, file.name)
    index = tmp_path / "four.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def peak_of(function, *arguments: object) -> int:
    function(*arguments)  # what is made once
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("read", [safetensors_file.read_model, checkpoint.read_manifest])
@pytest.mark.parametrize("files", ["one_file", "four_files"])
def test_a_tensor_takes_less_than_a_kilobyte_to_read(request, read, files):
    """So that 200,000 of them stay below 300 MiB, with 40 MiB of Python and NumPy."""
    assert peak_of(read, request.getfixturevalue(files)) < 1000 * MANY


def test_a_tensor_takes_less_than_a_kilobyte_to_show(tmp_path, capsys):
    rows = [(name, "F32", "1 2 3", "0123456789abcdef") for name in names_of(MANY)]
    assert peak_of(cli.show, ("tensor", "dtype", "shape", "sha256 begins"), rows) < 1000 * MANY


@pytest.mark.parametrize("files", ["one_file", "four_files"])
def test_what_is_read_and_checked_is_told_on_the_way(request, files):
    path, told = request.getfixturevalue(files), []
    safetensors_file.read_model(path, watch=lambda *given: told.append(given))
    assert {doing for doing, _, _ in told} == {"reading headers"}
    done, totals = [given[1] for given in told], {given[2] for given in told}
    assert done == sorted(done)
    assert totals == {done[-1]}  # all of it, in the end, and known from the beginning
    assert len(set(done)) >= MANY / safetensors_file.STEP
    told.clear()
    checkpoint.read_manifest(path, lambda *given: told.append(given))
    checked = [(done, total) for doing, done, total in told if doing == "checking"]
    assert checked == [(done, MANY) for done in range(0, MANY, safetensors_file.STEP)]


def test_a_terminal_shows_what_is_read(one_file, tmp_path):
    pty = pytest.importorskip("pty", reason="there are no terminals of this kind on Windows")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent), "TERM": "xterm"}
    command = [sys.executable, "-m", "gpuinit", "fingerprint", str(one_file), "--json"]
    with (tmp_path / "out.json").open("wb") as out:
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 2**16)
        except OSError:  # as Linux tells that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert running.wait() == 0
    assert b"reading headers" in shown
    assert b"100%" in shown
    assert len(json.loads((tmp_path / "out.json").read_bytes())["tensors"]) == MANY


def test_kinds_of_tensors_are_checked_once(tmp_path, monkeypatch):
    counted: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def counting(*given: object, **named: object) -> object:
            counted[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(owner, name, counting)

    count(checkpoint, "parse_entry")
    count(inspect, "signature")
    checkpoint.taken_by.cache_clear()
    exact = {f"b{i}": {"initializer": "ones"} for i in range(0, 1000, 2)}
    given = {
        "tensors": {"a{0..999}": [2], "b{0..999}": [2], "c": [3]},
        "patterns": {"b*": {"dtype": "float16"}},
    }
    (tmp_path / "a.json").write_text(json.dumps(given))
    entries = checkpoint.read_manifest(tmp_path / "a.json")
    assert [entry.name for entry in entries] == [f"{kind}{i}" for kind in "ab" for i in range(1000)] + ["c"]
    assert Counter((entry.dtype, entry.shape) for entry in entries) == {
        ("float32", (2,)): 1000,
        ("float16", (2,)): 1000,
        ("float32", (3,)): 1,
    }
    assert counted == {"parse_entry": 3, "signature": 1}

    given["patterns"] |= exact  # one for every other tensor: looked up, and not compared with every name
    monkeypatch.setattr(fnmatch, "translate", {"b*": "b.*"}.__getitem__)
    (tmp_path / "a.json").write_text(json.dumps(given))
    entries = checkpoint.read_manifest(tmp_path / "a.json")
    ones = {entry.name for entry in entries if entry.initializer == "ones"}
    assert ones == exact.keys()


def test_what_is_equal_to_python_is_not_of_one_kind(tmp_path):
    """True is 1 and 1.0 is 1, but no length."""
    for shape in ("[true]", "[1.0]"):
        (tmp_path / "a.json").write_text(f'{{"tensors": {{"a": [1], "b": {shape}}}}}')
        with pytest.raises(
            ValueError, match="tensor 'b': shape must be an integer or a sequence of integers"
        ):
            checkpoint.read_manifest(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"tensors": {"a": [1], "\\ud800": [1]}}')
    with pytest.raises(ValueError, match=r"tensor '\\ud800': name must be encodable as UTF-8"):
        checkpoint.read_manifest(tmp_path / "a.json")


def test_patterns_are_found_as_fnmatch_finds_them():
    chosen = random.Random(5)
    for _ in range(300):
        patterns = ["".join(chosen.choices("ab.*?[]!", k=chosen.randrange(5))) for _ in range(6)]
        patterns = list(dict.fromkeys(patterns))
        find = checkpoint.matcher(patterns)
        for _ in range(20):
            name = "".join(chosen.choices("ab.[]*", k=chosen.randrange(5)))
            assert find(name) == [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]


def test_the_data_of_a_file_are_opened_once(one_file, four_files, monkeypatch):
    one, four = (safetensors_file.read_model(path).tensors for path in (one_file, four_files))
    entries = checkpoint.read_manifest(one_file)
    opened = []
    real = safetensors_file.open_file

    def opening(file: Path, buffering: int = -1) -> object:
        opened.append(real(file, buffering))
        return opened[-1]

    monkeypatch.setattr(safetensors_file, "open_file", opening)
    assert safetensors_file.fingerprint(one) == safetensors_file.fingerprint(four)
    assert [Path(file.name).name for file in opened] == [
        one_file.name,
        *(f"{i}.safetensors" for i in range(4)),
    ]
    monkeypatch.setattr(safetensors_file, "MOST_OPEN", 3)
    safetensors_file.fingerprint({name: four[name] for name in names_of(8)})
    assert len(opened) == 5 + 8
    model = safetensors_file.Model({name: one[name] for name in names_of(20)}, {})
    assert len(checkpoint.verify(model, entries[:20], 0, "cpu")) == 20
    assert len(opened) == 5 + 8 + 1
    assert all(file.closed for file in opened)


def test_tables_of_any_length_fit_80_columns(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = [(name, "F32", "", "0123456789abcdef") for name in names_of(2003)]
    cli.show(("tensor", "dtype", "shape", "sha256 begins"), rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tensor                                 dtype   shape   sha256 begins"
    assert lines[1] == "─" * 71
    assert lines[2:] == [f"{name}   F32             0123456789abcdef" for name in names_of(2003)]


WIDE = ["plain", "a" * 200, "名前" * 50, "two words " * 12, "", "😀", "é" * 33, "-" * 79]


@pytest.mark.parametrize("columns", [1, 40, 41, 80, 200])
def test_what_is_wider_than_its_column_goes_on_in_the_next_line(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for rows in ([(text,) for text in WIDE], [(text, text[::-1], "x") for text in WIDE]):
        cli.show(("head", "other", "third")[: len(rows[0])], rows)
        out = capsys.readouterr().out
        assert max(map(cli.width_of, out.splitlines())) <= max(columns, 40)
        if len(rows[0]) == 1:  # nothing is lost but blanks
            assert "".join(out.split("\n", 2)[2].split()) == "".join("".join(WIDE).split())


def test_a_stream_without_unicode_gets_a_plain_line(monkeypatch, capsys):
    monkeypatch.setattr("gpuinit.cli.Console.encoding", "ascii")
    cli.show(("tensor",), [("é\x1b",)])
    assert capsys.readouterr().out == "tensor\n--------\n\\xe9\\x1b\n"
