"""The writer on disks that offer less, that fail, and under interrupts at any point."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import special_files

import gpuinit
from gpuinit import checkpoint, disk, safetensors_file

ENTRIES = [checkpoint.Entry(f"w{i}", (3, 5), "float32", "he_normal", {}) for i in range(4)]
ONE, SHARDS = 10**9, 100  # bytes of a file at most: one, or four and an index
COMPLETE = {
    ONE: ["m.safetensors"],
    SHARDS: [*(f"m-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "m.safetensors.index.json"],
}


def write(folder: Path, size: int = ONE) -> list[Path]:
    return checkpoint.write(ENTRIES, 0, folder / "m.safetensors", size, "cpu")


def listed(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def assert_complete(folder: Path, size: int) -> None:
    assert listed(folder) == sorted(COMPLETE[size])
    model = safetensors_file.read_model(folder / "m.safetensors")
    assert checkpoint.verify(model, ENTRIES, 0, "cpu") == []


def refuse(number: int, real: Callable, when: Callable[..., bool] = lambda *_: True) -> Callable:
    """The real call of the system, but with an error that has no path, as fsync's, when this is so."""

    def call(*arguments: object, **keywords: object) -> object:
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **keywords)

    return call


def is_probe(file: Path, *_: object) -> bool:
    return file.name.startswith(".gpuinit-")


def target(descriptor: int) -> str:
    """The file that a descriptor is of, on Linux; a folder's ends in a slash."""
    found = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    return f"{found}/" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else found


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell files apart")
NO = ("ENOTSUP", "ENOSYS", "EPERM", "EACCES", "EXDEV", "EROFS", "EIO", "ENOSPC", "EDQUOT", "EINVAL")


@pytest.mark.parametrize("name", NO)
@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_a_disk_without_rename_is_refused_by_its_path_before_anything_is_made(
    tmp_path, monkeypatch, name, size
):
    made = []
    monkeypatch.setattr(checkpoint, "windows", lambda *given: made.append(given))
    monkeypatch.setattr(Path, "rename", refuse(getattr(errno, name), Path.rename))
    with pytest.raises(OSError, match="when one byte was written and renamed there") as raised:
        write(tmp_path, size)
    assert (raised.value.errno, raised.value.filename) == (getattr(errno, name), str(tmp_path))
    assert raised.value.__notes__ == ["Nothing was left behind"]
    assert (made, listed(tmp_path)) == ([], [])


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "EDQUOT", "ENAMETOOLONG"])
def test_a_folder_that_takes_no_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Path, "open", refuse(getattr(errno, name), Path.open))
    with pytest.raises(OSError, match="one byte") as raised:
        write(tmp_path)
    assert raised.value.filename == str(tmp_path)
    assert raised.value.__notes__ == ["Nothing was left behind"]


@pytest.mark.parametrize("name", ["ENOTSUP", "ENOSYS", "EPERM", "EXDEV", "EROFS", "EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize(("size", "files"), [(ONE, 1), (SHARDS, 5)])
def test_what_is_finished_is_kept_whichever_rename_fails(tmp_path, monkeypatch, name, size, files):
    for failing in COMPLETE[size]:
        folder = tmp_path / failing
        folder.mkdir()
        with monkeypatch.context() as patched:
            fails = lambda file, to, name=failing: to.name == name  # noqa: E731
            patched.setattr(Path, "rename", refuse(getattr(errno, name), Path.rename, fails))
            with pytest.raises(OSError, match=os.strerror(getattr(errno, name))) as raised:
                write(folder, size)
        assert raised.value.filename == str(folder / f"{failing}.partial")
        left = [folder / file for file in listed(folder)]
        assert len(left) == files
        waiting = [file for file in left if file.suffix == ".partial"]
        (note,) = raised.value.__notes__
        assert note.startswith("All is written: to finish, take .partial off the name of ")
        if len(waiting) < 5:
            assert all(str(file) in note for file in waiting)
        for file in waiting:  # as the note says
            file.rename(file.with_suffix(""))
        assert_complete(folder, size)


@pytest.mark.parametrize("name", ["ENOTSUP", "ENOSYS", "EINVAL"])
@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_a_disk_without_fsync_gets_its_files_and_the_user_a_warning(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(os, "fsync", refuse(getattr(errno, name), os.fsync))
    with pytest.warns(UserWarning, match=f"^{tmp_path} has no fsync: what is written may not survive"):
        write(tmp_path, size)
    assert_complete(tmp_path, size)
    with pytest.raises(UserWarning, match="has no fsync"):  # warnings are errors here
        checkpoint.write(ENTRIES, 0, tmp_path / "other.safetensors", size, "cpu")
    assert listed(tmp_path) == sorted(COMPLETE[size])


@linux
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "EROFS"])
@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_a_sync_that_fails_names_the_file(tmp_path, monkeypatch, name, size):
    """Of data: they may not be there, and nothing is left. Of the folder, in the end: all is there."""
    number, folder = getattr(errno, name), f"{tmp_path}/"
    failing = tmp_path / f"{COMPLETE[size][0]}.partial"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse(number, os.fsync, lambda opened: target(opened) == str(failing)))
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            write(tmp_path, size)
    assert raised.value.filename == str(failing)
    assert raised.value.__notes__ == ["Nothing was left behind"]
    assert listed(tmp_path) == []
    at_last = lambda opened: target(opened) == folder and COMPLETE[size][0] in listed(tmp_path)  # noqa: E731
    monkeypatch.setattr(os, "fsync", refuse(number, os.fsync, at_last))
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        write(tmp_path, size)
    assert raised.value.filename == str(tmp_path)
    assert raised.value.__notes__ == ["All files are in place"]
    assert_complete(tmp_path, size)


class Failing:
    """An open file whose write or close fails, as those of network disks do."""

    def __init__(self, file, call: str):
        self.file, self.call = file, call

    def __getattr__(self, name: str):
        real = getattr(self.file, name)
        if name != self.call:
            return real

        def fail(*given: object) -> None:
            real(*given)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return fail


@pytest.mark.parametrize("call", ["write", "flush", "close"])
@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, call, size):
    failing = tmp_path / f"{COMPLETE[size][-1]}.partial"
    real = Path.open

    def opened(file: Path, *given: object, **keywords: object):
        made = real(file, *given, **keywords)
        return Failing(made, call) if file == failing else made

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="Input/output error") as raised:
        write(tmp_path, size)
    assert raised.value.filename == str(failing)
    assert raised.value.__notes__ == ["Nothing was left behind"]
    assert listed(tmp_path) == []


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("usage", [Usage(0, 0, 0), Usage(10**9, 10**9, 0), Usage(0, 0, 1)])
def test_a_disk_that_says_0_is_not_believed(tmp_path, monkeypatch, usage):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    write(tmp_path)
    assert_complete(tmp_path, ONE)


def test_a_disk_that_does_not_say_is_no_fault_and_one_that_says_too_little_is(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9 - 1, 1))
    with pytest.raises(OSError, match=f"^{tmp_path} has 1 B free, and m.safetensors takes 240 B"):
        write(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", refuse(errno.ENOSYS, shutil.disk_usage))
    write(tmp_path)
    assert_complete(tmp_path, ONE)


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EINVAL", "ENOTSUP"])
def test_a_folder_that_cannot_be_opened_does_not_lose_the_file(tmp_path, monkeypatch, name):
    opened = lambda file, *_: Path(file) == tmp_path  # noqa: E731
    monkeypatch.setattr(os, "open", refuse(getattr(errno, name), os.open, opened))
    write(tmp_path)
    assert_complete(tmp_path, ONE)


AS_NOBODY = """
import os, sys
from pathlib import Path
from gpuinit import checkpoint
folder = Path(sys.argv[1])
entries = [checkpoint.Entry("w", (3, 5), "float32", "he_normal", {})]
list(checkpoint.windows(entries[0], 0, "cpu"))
if os.getuid() == 0:  # who may do anything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    os.listdir(folder)
    sys.exit("the folder can be read")
except PermissionError:
    pass
print(*checkpoint.write(entries, 0, folder / "m.safetensors", 10**9, "cpu"))
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="Windows has no modes of folders")
def test_a_folder_that_may_be_written_and_not_read_takes_the_file():
    with tempfile.TemporaryDirectory() as outer:  # pytest's own may be passed by one user alone
        folder = Path(outer) / "drop"
        folder.mkdir()
        Path(outer).chmod(0o755)
        folder.chmod(0o333)
        environment = {**os.environ, "PYTHONPATH": str(Path(gpuinit.__file__).parent.parent)}
        command = [sys.executable, "-c", AS_NOBODY, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        folder.chmod(0o755)
        assert (done.returncode, done.stderr) == (0, "")
        assert listed(folder) == ["m.safetensors"]
        assert len(safetensors_file.read_model(folder / "m.safetensors").tensors) == 1


@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_a_name_that_is_too_long_with_its_endings_is_refused_at_once(tmp_path, monkeypatch, size):
    """It would fit without .partial, or without the number of a shard."""
    made = []
    monkeypatch.setattr(checkpoint, "windows", lambda *given: made.append(given))
    name = "m" * (255 - len(".safetensors")) + ".safetensors"
    with pytest.raises(OSError, match="File name too long") as raised:
        checkpoint.write(ENTRIES, 0, tmp_path / name, size, "cpu")
    assert str(tmp_path) in raised.value.filename
    assert (made, listed(tmp_path)) == ([], [])


def test_links_to_folders_and_paths_from_here_lead_to_the_place(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    checkpoint.write(ENTRIES, 0, Path("link/m.safetensors"), SHARDS, "cpu")
    assert_complete(tmp_path / "real", SHARDS)
    monkeypatch.chdir(tmp_path / "link")
    checkpoint.write(ENTRIES, 0, Path("o.safetensors"), ONE, "cpu")
    model = safetensors_file.read_model(tmp_path / "real" / "o.safetensors")
    assert checkpoint.verify(model, ENTRIES, 0, "cpu") == []


def meanwhile(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """As the data of the last file are made."""
    real = checkpoint.windows

    def call(entry: checkpoint.Entry, *given: object, **keywords: object):
        if entry == ENTRIES[-1]:
            do()
        return real(entry, *given, **keywords)

    monkeypatch.setattr(checkpoint, "windows", call)


@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_a_folder_that_is_removed_meanwhile_is_named(tmp_path, monkeypatch, size):
    folder = tmp_path / "gone"
    folder.mkdir()
    meanwhile(monkeypatch, lambda: shutil.rmtree(folder))
    with pytest.raises(FileNotFoundError) as raised:
        write(folder, size)
    assert str(folder) in raised.value.filename
    assert raised.value.__notes__ == ["Nothing was left behind"]
    assert listed(tmp_path) == []


@pytest.mark.parametrize("size", [ONE, SHARDS])
@pytest.mark.parametrize("stopping", [KeyboardInterrupt, None])
def test_another_writers_file_is_neither_deleted_nor_moved(tmp_path, monkeypatch, size, stopping):
    """Ours was deleted by hand, and another gpuinit has begun to write its own under the same name."""
    first = tmp_path / f"{COMPLETE[size][0]}.partial"

    def replace() -> None:
        first.unlink()
        (tmp_path / "keep its number").write_bytes(b"")  # or the next file gets it
        first.write_bytes(b"another's")
        if stopping:
            raise stopping

    meanwhile(monkeypatch, replace)
    with pytest.raises(stopping or OSError) as raised:
        write(tmp_path, size)
    assert first.read_bytes() == b"another's"
    assert not [name for name in listed(tmp_path) if name.endswith((".safetensors", ".json"))]
    if stopping:
        assert raised.value.__notes__ == [
            f"Left behind: {first}, which may be another's. To be deleted by hand"
        ]


def test_a_target_that_appears_as_it_is_moved_is_not_touched(tmp_path, monkeypatch):
    other = tmp_path / "m.safetensors"

    def appears(file: Path, to: Path) -> None:
        if is_probe(file):
            return real(file, to)
        other.write_text("another's")
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file))

    real = Path.rename
    monkeypatch.setattr(Path, "rename", appears)
    with pytest.raises(FileExistsError) as raised:
        write(tmp_path)
    assert other.read_text() == "another's"
    assert raised.value.__notes__[0].startswith("All is written: to finish, take .partial off")
    assert listed(tmp_path) == ["m.safetensors", "m.safetensors.partial"]


def test_a_disk_that_deletes_nothing_is_told_of_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", refuse(errno.EPERM, Path.unlink))
    with pytest.raises(OSError, match="one byte") as raised:
        write(tmp_path)
    (left,) = tmp_path.iterdir()
    assert raised.value.__notes__ == [f"Left behind: {left} (Operation not permitted). To be deleted by hand"]


class Stopper:
    """Raises KeyboardInterrupt at one step of the writer in the main thread: a line or a bytecode."""

    def __init__(self, step: int):
        self.left = step

    def __call__(self, frame: FrameType, event: str, argument: object):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None  # the locks of threading are taken and let go of in C, where no Ctrl-C comes
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def end_of_threads() -> None:
    """What Python waits for before it ends."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.name.startswith("gpuinit checkpoint"):
            thread.join()


@pytest.mark.parametrize("other", [None, "m.safetensors.partial"])
def test_ctrl_c_at_any_bytecode_leaves_nothing_or_all(tmp_path, monkeypatch, other):
    """Nor does it touch what another writer has begun, though that was seen only when ours was opened."""
    if other:
        monkeypatch.setattr(checkpoint, "check_place", lambda *_: None)
    ends = {"nothing": 0, "all": 0}
    for step in range(3000):
        folder = tmp_path / str(step)
        folder.mkdir()
        if other:
            (folder / other).write_text("another's")
        note = None
        try:
            with Stopper(step):
                write(folder)
        except KeyboardInterrupt as error:
            note = getattr(error, "__notes__", [None])[0]
        except FileExistsError:
            break
        else:
            break
        finally:
            end_of_threads()
        if other:
            assert (folder / other).read_text() == "another's"
            (folder / other).unlink()
        left = listed(folder)
        assert left in ([], ["m.safetensors"]), step
        ends["all" if left else "nothing"] += 1
        if note is not None:
            assert note == (f"{folder}/m.safetensors is complete" if left else "Nothing was left behind")
        if left:
            assert_complete(folder, ONE)
    assert step > 100
    assert ends["nothing"] > 20
    assert (ends["all"] > 5) is (other is None)


@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_an_interrupt_as_a_file_has_been_opened_leaves_nothing(tmp_path, monkeypatch, size):
    """Wherever it comes from: each of the files, the one that is tried first among them."""
    real = Path.open
    for step in range(10):
        calls = iter(range(step, -1, -1))

        def opened(file: Path, *given: object, calls=calls, **keywords: object):
            made = real(file, *given, **keywords)
            if next(calls, None) == 0:
                made.close()
                raise KeyboardInterrupt
            return made

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", opened)
            if step == (2 if size == ONE else 6):
                write(tmp_path, size)
                break
            with pytest.raises(KeyboardInterrupt) as raised:
                write(tmp_path, size)
        assert raised.value.__notes__ == ["Nothing was left behind"]
        assert listed(tmp_path) == []
    assert_complete(tmp_path, size)


def test_further_interrupts_do_not_stop_the_cleaning_up(tmp_path, monkeypatch):
    """One as the data are made, two as what was made is removed."""
    proceed = threading.Event()
    meanwhile(monkeypatch, lambda: (os.kill(os.getpid(), signal.SIGINT), proceed.wait(60)))
    real_join, joins = threading.Thread.join, iter(range(3))

    def join(thread: threading.Thread, *given: object) -> None:
        if thread.name == "gpuinit checkpoint":
            proceed.set()
            if next(joins, 2) < 2:
                raise KeyboardInterrupt
        real_join(thread, *given)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt) as raised:
        write(tmp_path)
    assert next(joins, None) is None
    assert raised.value.__notes__ == ["Nothing was left behind"]
    assert listed(tmp_path) == []


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "a"
    special_files.make(kind, path)
    with pytest.raises(OSError, match=f"must be a regular file, got a {kind}: '{path}'$"):
        disk.open_file(path)


def test_a_file_that_becomes_a_pipe_as_it_is_opened_is_refused_without_waiting(tmp_path, monkeypatch):
    path, real = tmp_path / "a", Path.stat
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda file, **_: real(Path(__file__)))
    with pytest.raises(OSError, match=f"must be a regular file, got a pipe: '{path}'$"):
        disk.open_file(path)


@pytest.mark.parametrize(("name", "shown"), [("a\0b", r"'a\\x00b'"), ("a\ud800b", r"'a\\ud800b'")])
def test_a_name_that_no_path_can_have_is_named(name, shown):
    wanted = "a path must have no null character and no half of a surrogate pair"
    with pytest.raises(ValueError, match=f"^{wanted}, got {shown}$"):
        disk.open_file(Path(name))


@pytest.mark.parametrize("size", [ONE, SHARDS])
def test_an_index_holds_no_name_that_is_not_utf8(tmp_path, size):
    path = tmp_path / os.fsdecode(b"m\xff.safetensors")
    if size == ONE:
        assert checkpoint.write(ENTRIES, 0, path, size, "cpu") == [path]
    else:
        with pytest.raises(ValueError, match=r"^the output must be named in UTF-8, as an index .* 4 files"):
            checkpoint.write(ENTRIES, 0, path, size, "cpu")
        assert listed(tmp_path) == []


@pytest.mark.parametrize("name", [".", "/", ""])
def test_a_path_without_a_name_is_no_file(name):
    with pytest.raises(OSError, match="must be a regular file, got a folder"):
        safetensors_file.read_model(Path(name))
    with pytest.raises(ValueError, match=r"^the output must be named \*.safetensors, got "):
        checkpoint.write(ENTRIES, 0, Path(name), ONE, "cpu")
