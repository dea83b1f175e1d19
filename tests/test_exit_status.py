"""How the commands end, and what they say: exit status, one line, nothing that a terminal obeys."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import special_files

import gpuinit
from gpuinit import checkpoint, doctor, messages
from gpuinit.__main__ import main

pytest.importorskip("click", reason='click is not installed: pip install "gpuinit[cli]"')

from gpuinit import cli

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MANIFEST = '{"tensors": {"w{0..2}": [4, 4]}}'


def run(capsys, *arguments: object) -> SimpleNamespace:
    status: object = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = stopped.code or 0
    out, err = capsys.readouterr()
    return SimpleNamespace(status=status, out=out, err=err)


def assert_one_line(err: str) -> None:
    assert re.fullmatch(r"gpuinit: .{1,1200}\.\n", err), err
    assert err[:-1].isprintable()


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> Path:
    """A folder, the current one, with a model and its manifest."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(MANIFEST)
    checkpoint.write(checkpoint.read_manifest(Path("a.json")), 0, Path("m.safetensors"), 10**9, "cpu")
    return tmp_path


COMMANDS = {
    "sample": (["sample", "9", "--device", "cpu"], "gpuinit.__main__.sample"),
    "default": ([], "gpuinit.__main__.sample"),
    "doctor": (["doctor"], "gpuinit.doctor.examine"),
    "checkpoint": (["checkpoint", "a.json", "-o", "n.safetensors"], "gpuinit.checkpoint.write"),
    "verify": (["verify", "m.safetensors", "a.json"], "gpuinit.checkpoint.verify"),
    "fingerprint": (["fingerprint", "m.safetensors"], "gpuinit.safetensors_file.fingerprint"),
    "plot": (["plot", "-o", "a.png"], "gpuinit.plot.draw"),
}


def raising(error: BaseException):
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_every_command_with_128_and_its_number(model, capsys, monkeypatch, command, number):
    if command == "plot":
        pytest.importorskip("matplotlib")
    arguments, place = COMMANDS[command]
    before = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr(place, lambda *_, **__: (signal.raise_signal(number), time.sleep(60)))
    found = run(capsys, *arguments)
    assert (found.status, found.out, found.err) == (128 + number, "", "gpuinit: stopped.\n")
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_signals_that_are_ignored_stay_so(model, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: signal.raise_signal(SIGNALS[-1]) or {"healthy": False})
    monkeypatch.setattr(doctor, "table", lambda *_: "")
    before = signal.signal(SIGNALS[-1], signal.SIG_IGN)
    try:
        assert run(capsys, "doctor").status == 2
    finally:
        signal.signal(SIGNALS[-1], before)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "error",
    [
        TypeError("a"),
        ValueError("a"),
        RuntimeError("a"),
        RecursionError("a"),
        ImportError("a"),
        MemoryError(),
        UserWarning("a"),
        OSError("a"),
        OSError(errno.EIO, "a"),
        FileNotFoundError(errno.ENOENT, "a", "b"),
        OverflowError("a"),
        KeyError("a\x1b"),
        AttributeError("a"),
        EOFError("a"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_of_every_command_has_status_2(model, capsys, monkeypatch, command, error):
    if command == "plot":
        pytest.importorskip("matplotlib")
    arguments, place = COMMANDS[command]
    monkeypatch.setattr(place, raising(error))
    found = run(capsys, *arguments)
    assert (found.status, found.out) == (2, "")
    if isinstance(error, (OverflowError, LookupError, AttributeError, EOFError)):  # of ours: where it was
        assert found.err.startswith("Traceback (most recent call last):\n")
        assert type(error).__name__ in found.err
        assert "\x1b" not in found.err
    else:
        assert_one_line(found.err)


USAGE = [
    ["sample", "x"],
    ["--shape"],
    ["--dtype", "int8"],
    ["--dtype", "\x1b[2J"],
    ["sample", "--no"],
    ["sample", "--\x1b[2J"],
    ["3", "--shape", "4"],
    ["doctor", "--no"],
    ["doctor", "x" * 5000],
    ["checkpoint"],
    ["checkpoint", "a.json"],
    ["checkpoint", "--\x1b[2J"],
    ["verify", "a", "b", "c\x1b[2J"],
    ["verify", "a.json", "a.json", "--seed", "x" * 5000],
    ["plot", "he\x1b[2J", "-o", "a.png"],
    ["fingerprint", "--seed", "1"],
    ["foo"],
    ["foo\x1b[2J"],
    ["/tmp"],
    ["./m.safetensors"],
    ["x" * 5000],
    [""],
    [" "],
    ["é"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=lambda given: " ".join(given)[:20].encode().hex())
def test_every_error_of_usage_is_one_line_and_has_status_2(model, capsys, arguments):
    found = run(capsys, *arguments)
    assert (found.status, found.out) == (2, "")
    assert_one_line(found.err)


def test_only_what_differs_has_status_1(model, capsys, monkeypatch):
    assert run(capsys, "verify", "m.safetensors", "a.json").status == 0
    assert run(capsys, "verify", "m.safetensors", "a.json", "--seed", 1).status == 1
    assert run(capsys, "verify", "none.safetensors", "a.json").status == 2
    monkeypatch.setattr(doctor, "GOLDEN", (("he_normal", "float32", "0" * 64, {}),))
    assert run(capsys, "doctor").status == 2


def spawn(model: Path, *arguments: str, shell: str = "") -> subprocess.CompletedProcess:
    """The command in a process of its own, with what a shell adds to it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent)}
    environment["PYTHONUNBUFFERED"] = ""  # what is printed waits for the end
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "gpuinit", *arguments]
    return subprocess.run(
        command, cwd=model, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


PRINTING = {
    "sample": ("sample", "9", "--device", "cpu"),
    "help": ("-h",),
    "help of sample": ("sample", "-h"),
    "help of verify": ("verify", "-h"),
    "version": ("-V",),
    "a table": ("fingerprint", "m.safetensors"),
    "json": ("fingerprint", "m.safetensors", "--json"),
    "a difference": ("verify", "m.safetensors", "a.json", "--seed", "1"),
    "a checkpoint": ("checkpoint", "a.json", "-o", "n.safetensors"),
}


@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_output_that_nobody_reads_has_the_status_of_a_closed_pipe_and_a_full_one_2(model, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent)}
    environment["PYTHONUNBUFFERED"] = "1"  # and does not wait; tests/test_main.py has the other
    command = [sys.executable, "-m", "gpuinit", *arguments]
    found = subprocess.run(
        command, cwd=model, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")
    (model / "n.safetensors").unlink(missing_ok=True)
    if Path("/dev/full").exists():
        found = spawn(model, *arguments, shell="> /dev/full")
        line = (
            "gpuinit: standard output: No space left on device. Free some of the disk, or choose another.\n"
        )
        assert (found.returncode, found.stderr) == (2, line)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["fingerprint", "m.safetensors"], 0),
        (["foo"], 2),
        (["verify", "m.safetensors", "a.json", "--seed=1"], 1),
    ],
)
@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_the_status_stays_where_a_stream_is_closed(model, arguments, status, shell):
    if "/dev/full" in shell and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    assert spawn(model, *arguments, shell=shell).returncode == status


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_process_ends_it_so(model, number):
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent)}
    code = (
        "import signal; from gpuinit import __main__ as m; m.sample = lambda *_: (print('on', flush=True), "
    )
    code += "signal.pause()); m.main(['sample'])"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(number)
        _, err = process.communicate()
    assert (process.returncode, err) == (128 + number, "gpuinit: stopped.\n")


def test_further_signals_do_not_end_the_cleaning_up(model, capsys, monkeypatch):
    """Two while it is waited for, and one while the message is made: none comes between."""
    proceed = threading.Event()
    real, alive, noted = checkpoint.windows, threading.Thread.is_alive, messages.noted

    def windows(*given: object, **named: object) -> Iterator[object]:
        if not proceed.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            proceed.wait(60)
        return real(*given, **named)

    def is_alive(thread: threading.Thread) -> bool:
        if thread.name == "gpuinit checkpoint" and not proceed.is_set():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            proceed.set()
        return alive(thread)

    def note(*given: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return noted(*given)

    monkeypatch.setattr(checkpoint, "windows", windows)
    monkeypatch.setattr(threading.Thread, "is_alive", is_alive)
    monkeypatch.setattr(messages, "noted", note)
    ended = run(capsys, "checkpoint", "a.json", "-o", "n.safetensors", "--device", "cpu")
    assert proceed.is_set()
    assert (ended.status, ended.err) == (143, "gpuinit: stopped. Nothing was left behind.\n")
    assert sorted(file.name for file in model.iterdir()) == ["a.json", "m.safetensors"]


ESCAPES = "\x1b[2J\x07\u202e"
SHOWN = r"\x1b[2J\x07\u202e"


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "{}.safetensors", "a.json"],
        ["verify", "m.safetensors", "{}.json"],
        ["fingerprint", "{}"],
        ["checkpoint", "{}.toml", "-o", "n.safetensors"],
        ["checkpoint", "a.json", "-o", "{}"],
        ["checkpoint", "a.json", "-o", "{}/n.safetensors"],
        ["checkpoint", "a.json", "-o", "n.safetensors", "--max-shard-size", "{}"],
        ["checkpoint", "a.json", "-o", "n.safetensors", "--device", "{}"],
        ["plot", "-o", "{}"],
        ["plot", "-o", "a.{}"],
        ["--device", "{}"],
        ["doctor", "{}"],
        ["{}"],
    ],
)
def test_a_message_shows_escapes_and_cuts_what_it_quotes(model, capsys, arguments):
    if "plot" in arguments:
        pytest.importorskip("matplotlib")
    found = run(capsys, *(argument.format(ESCAPES) for argument in arguments))
    assert found.status == 2
    assert_one_line(found.err)
    assert SHOWN.lower() in found.err.replace("\\\\", "\\").lower()  # matplotlib's are lower case
    for long in ("x" * 100_000, "x y" * 40_000):
        found = run(capsys, *(argument.format(long) for argument in arguments))
        assert found.status == 2
        assert_one_line(found.err)
        assert len(found.err) < 1100


@pytest.mark.parametrize(
    ("manifest", "end"),
    [
        ({"tensors": {ESCAPES: [-1]}}, "of integers >= 0, got [-1]"),
        ({"tensors": {"n" * 9000: [-1]}}, "of integers >= 0, got [-1]"),
        ({"tensors": {"n m" * 9000: [-1]}}, "of integers >= 0, got [-1]"),
        ({"tensors": {"n": [1] * 9000 + [-1]}}, "1, -1]"),
        ({"tensors": {"n": {"shape": [1], "dtype": "d" * 9000}}}, "dddd'"),
        ({"tensors": {"n": [1]}, "p" * 9000: {}}, "pppp"),
        ({"tensors": {"n": [1]}, "patterns": {"p" * 9000: {}}}, "got none that it does"),
        ({"like": "l" * 9000}, "File name too long"),
        ([0] * 9000, "0, 0]"),
    ],
)
def test_a_message_on_a_manifest_is_short_and_says_what_is_wrong(model, capsys, manifest, end):
    Path("b.json").write_text(json.dumps(manifest))
    found = run(capsys, "checkpoint", "b.json", "-o", "n.safetensors")
    assert found.status == 2
    assert_one_line(found.err)
    assert len(found.err) < 1100
    assert "b.json: " in found.err or "like" in manifest
    assert end in found.err


def test_what_is_cut_keeps_its_beginning_and_its_end():
    assert messages.cut("short 'text' of 'two'") == "short 'text' of 'two'"
    long = "begin" + "x" * 9000 + "end"
    for quoted in (f"'{long}'", f'"{long}"', long, f"'{long} and blanks'", f"'its \\' {long}'"):
        text = messages.cut(f"tensor {quoted}: must be, got 'that'")
        assert text.startswith("tensor ")
        assert "begin" in text
        assert "end" in text
        assert text.endswith(": must be, got 'that'")
        assert len(text) < 220
    assert len(messages.cut("a b " * 9000)) <= messages.MOST
    apart = "the file's " + "word " * 60 + "and others' words"  # no quotations
    assert messages.cut(apart) == apart


@pytest.mark.parametrize("name", [ESCAPES, "line\nbreak", b"\xff".decode("utf-8", "surrogateescape")])
def test_output_shows_escapes_too(model, capsys, name, monkeypatch):
    """Paths, the settings that doctor lists, and a name of bytes that are no text."""
    try:
        Path(f"{name}.safetensors").write_bytes(Path("m.safetensors").read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("the file system does not take such a name")
    Path(f"{name}.json").write_text(MANIFEST)
    shown = messages.visible(name)
    for arguments in (
        ("verify", f"{name}.safetensors", f"{name}.json"),
        ("verify", f"{name}.safetensors", f"{name}.json", "--seed", 1),
        ("fingerprint", f"{name}.safetensors"),
        ("checkpoint", f"{name}.json", "-o", f"{name}{name}.safetensors"),
    ):
        found = run(capsys, *arguments)
        assert found.status in (0, 1), found.err
        assert shown in found.out
        assert all(line.isprintable() for line in found.out.split("\n"))
    monkeypatch.setenv("GPUINIT_NOTHING", name)
    assert all(line.isprintable() for line in run(capsys, "doctor").out.split("\n"))


@pytest.fixture(params=["pipe", "socket", "folder", "device", "stdin"])
def no_file(request, tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """What is no regular file; to wait for it is an error after a while."""
    path = tmp_path / "it.safetensors"
    kind = request.param
    closing: list[int] = []
    if kind != "stdin":
        special_files.make(kind, path)
    else:
        kind, closing = "pipe", list(os.pipe())
        path.symlink_to(f"/proc/self/fd/{closing[0]}")  # as /dev/stdin is
        if not path.exists():
            pytest.skip("there is no /proc/self/fd")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited"))
    signal.alarm(60)
    yield SimpleNamespace(path=path, kind=kind)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in closing:
        os.close(number)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_what_is_no_regular_file_is_refused_by_its_name_without_waiting(no_file, model, capsys):
    path, kind = no_file.path, no_file.kind
    for name in ("it.json", "it.toml", "it.index.json", "it"):
        (model / name).symlink_to(path)
    Path("like.json").write_text('{"like": "it.safetensors"}')
    Path("i.safetensors.index.json").write_text('{"weight_map": {"a": "it.safetensors"}}')
    for arguments, name in [
        (("verify", path, "a.json"), path),
        (("verify", "it", "a.json"), "it"),
        (("verify", "m.safetensors", "it.json"), "it.json"),
        (("verify", "m.safetensors", "it.toml"), "it.toml"),
        (("verify", "m.safetensors", path), path),
        (("fingerprint", path), path),
        (("fingerprint", "it.index.json"), "it.index.json"),
        (("fingerprint", "i.safetensors"), "it.safetensors"),
        (("checkpoint", "it.toml", "-o", "n.safetensors"), "it.toml"),
        (("checkpoint", "it", "-o", "n.safetensors"), "it"),
        (("checkpoint", "like.json", "-o", "n.safetensors"), "it.safetensors"),
    ]:
        found = run(capsys, *arguments)
        assert found.status == 2
        assert found.err == f"gpuinit: {name}: must be a regular file, got a {kind}.\n"
    if kind != "device":  # that is zeros without an end
        pytest.importorskip("matplotlib")
        (model / "it.png").symlink_to(path)
        found = run(capsys, "plot", "-o", "it.png")
        assert found.err == f"gpuinit: it.png: must be a regular file, got a {kind}.\n"


def test_a_regular_file_may_come_as_stdin(model):
    if not Path("/dev/stdin").exists():
        pytest.skip("there is no /dev/stdin")
    assert spawn(model, "verify", "m.safetensors", "/dev/stdin", shell="< a.json").returncode == 0
    found = spawn(model, "verify", "m.safetensors", "/dev/stdin", shell="< /dev/null")
    assert found.stderr == "gpuinit: /dev/stdin: must be a regular file, got a device.\n"


@pytest.fixture
def no_click(monkeypatch):
    monkeypatch.setitem(sys.modules, "click", None)
    monkeypatch.delitem(sys.modules, "gpuinit.cli", raising=False)
    monkeypatch.delattr(gpuinit, "cli", raising=False)


@pytest.fixture(params=["click", "no click"])
def with_and_without_click(request):
    if request.param == "no click":
        request.getfixturevalue("no_click")


def test_version_help_and_the_names_of_the_commands_need_no_click(with_and_without_click, model, capsys):
    for option in ("-V", "--version"):
        found = run(capsys, option)
        assert (found.status, found.out) == (0, f"gpuinit, version {gpuinit.__version__}\n")
    for option in ("-h", "--help"):
        found = run(capsys, option)
        assert found.status == 0
        assert re.findall(r"^  (\w+) ", found.out, re.MULTILINE) == list(messages.COMMANDS)
        assert all(len(line) <= 88 for line in found.out.splitlines())
    for name in ("foo", "m.safetensors", "no/such/folder", "./m.safetensors", str(model), "", "é"):
        found = run(capsys, name)
        names = "sample, doctor, checkpoint, verify, fingerprint, plot"
        end = f", or the shape of sample, got {messages.visible(ascii(name))}.\n"
        assert found.status == 2
        assert found.err.replace("é", "\\xe9") == f"gpuinit: the command must be {names}{end}"


def test_the_commands_that_are_told_are_those_that_there_are():
    assert set(messages.COMMANDS) == set(cli.commands.commands)


def test_every_command_that_needs_click_says_so(no_click, capsys):
    for name in ("checkpoint", "verify", "fingerprint", "plot"):
        found = run(capsys, name, "-h")
        assert found.status == 2
        assert found.err.startswith(f"gpuinit: `{name}` needs click and rich, and click is not installed. To")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_completes_and_runs_nothing(capfd, monkeypatch, shell):
    monkeypatch.setattr("gpuinit.__main__.sample", raising(AssertionError("sample ran")))
    monkeypatch.setenv("_GPUINIT_COMPLETE", f"{shell}_source")
    found = run(capfd)
    assert found.status == 0
    assert f"_GPUINIT_COMPLETE={shell}_complete" in found.out
    monkeypatch.setenv("_GPUINIT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", "gpuinit ")
    monkeypatch.setenv("COMP_CWORD", "1" if shell != "fish" else "")
    found = run(capfd)
    assert found.status == 0
    assert all(name in found.out for name in messages.COMMANDS)
    monkeypatch.setenv("COMP_WORDS", "gpuinit verify --dev")
    monkeypatch.setenv("COMP_CWORD", "2" if shell != "fish" else "--dev")
    found = run(capfd)
    assert "--device" in found.out


@pytest.mark.parametrize("asked", ["tcsh_source", "bash", "bash_no", "x"])
def test_a_completion_that_there_is_not_is_an_error(capfd, monkeypatch, asked):
    monkeypatch.setenv("_GPUINIT_COMPLETE", asked)
    found = run(capfd)
    assert (found.status, found.out) == (2, "")
    line = "gpuinit: _GPUINIT_COMPLETE must be bash, zsh or fish with _source or _complete behind it"
    assert found.err == f"{line}, got '{asked}'.\n"


def test_a_completion_without_words_or_click_is_an_error(capsys, monkeypatch, request):
    monkeypatch.setenv("_GPUINIT_COMPLETE", "bash_complete")
    monkeypatch.delenv("COMP_WORDS", raising=False)
    found = run(capsys)
    assert (found.status, found.out) == (2, "")
    assert "must come with COMP_WORDS and COMP_CWORD, got no 'COMP_WORDS'" in found.err
    request.getfixturevalue("no_click")
    found = run(capsys)
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith("gpuinit: completion needs click and rich, and click is not installed.")


def test_a_warning_is_one_line(model, capsys, monkeypatch):
    """In every command, and whatever it quotes."""
    monkeypatch.setattr("gpuinit.devices.find_cuda_problem", lambda _: f"there is none{ESCAPES}")
    monkeypatch.setattr("gpuinit.devices.fallback_warned", False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("warnings.filters", [("default", None, Warning, None, 0)])
        found = run(capsys, "9", "--device", "cuda", "--json")
    assert found.status == 0
    assert_one_line(found.err)
    assert f"there is none{SHOWN}" in found.err
