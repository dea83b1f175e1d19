"""gpuinit.jax as part of a program: JAX's transformations, its ways to keep one, and what can go wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import gpuinit

jax = pytest.importorskip("jax", reason='JAX is not installed: pip install "gpuinit[jax]"')

import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax_helpers import SEED, SHAPE, core, key, same  # noqa: E402

import gpuinit.jax  # noqa: E402
from gpuinit.jax import ffi, traced  # noqa: E402

ROOT = Path(__file__).parent.parent
SEEDS = (0, 3, 2**32, SEED, 2**64 - 1)
KEYS = jax.random.wrap_key_data(jnp.array([[s >> 32, s & 0xFFFFFFFF] for s in SEEDS], jnp.uint32))

init = gpuinit.jax.he_normal()


def draw(k):
    return init(k, SHAPE)


def loop(keys):
    start = jnp.zeros((len(SEEDS), *SHAPE))
    return lax.fori_loop(0, len(SEEDS), lambda i, made: made.at[i].set(draw(keys[i])), start)


def while_loop(keys):
    start = (0, jnp.zeros((len(SEEDS), *SHAPE)))
    return lax.while_loop(
        lambda state: state[0] < len(SEEDS),
        lambda state: (state[0] + 1, state[1].at[state[0]].set(draw(keys[state[0]]))),
        start,
    )[1]


# Functions of five keys that give the five arrays.
OVER_KEYS = {
    "vmap": jax.vmap(draw),
    "vmap of vmap": lambda keys: jax.vmap(jax.vmap(draw))(keys.reshape(1, -1))[0],
    "vmap, out last": lambda keys: jnp.moveaxis(jax.vmap(draw, out_axes=-1)(keys), -1, 0),
    "vmap of jit": jax.vmap(jax.jit(draw)),
    "vmap of words": lambda keys: jax.vmap(draw)(jax.random.key_data(keys)),
    "vmap of scan": lambda keys: jax.vmap(lambda k: lax.scan(lambda c, x: (c, draw(x)), 0, k[None])[1][0])(
        keys
    ),
    "scan": lambda keys: lax.scan(lambda carry, k: (carry, draw(k)), 0, keys)[1],
    "map": partial(lax.map, draw),
    "map in batches": partial(lax.map, draw, batch_size=2),
    "fori_loop": loop,
    "while_loop": while_loop,
    "one by one": lambda keys: jnp.stack([draw(keys[i]) for i in range(len(SEEDS))]),
}


@pytest.mark.parametrize("under", [lambda f: f, jax.jit])
@pytest.mark.parametrize("name", OVER_KEYS)
def test_many_keys(name, under):
    made = under(OVER_KEYS[name])(KEYS)
    assert made.shape == (len(SEEDS), *SHAPE)
    assert all(same(made[i], core(seed=seed)) for i, seed in enumerate(SEEDS))


def choose(k):
    return lax.cond(k[1] < 0, lambda k: draw(k) * 2, draw, k)


def rematerialised(k):
    """The gradient of sum(x @ w) is a sum of w's rows; w is made again on the way back."""

    @jax.checkpoint
    def loss(x, k):
        return jnp.sum(jnp.sin(x * draw(k)))

    return jax.grad(loss)(jnp.zeros(SHAPE), k)  # cos(0) * w


# Functions of one key that give its array.
OF_A_KEY = {
    "jit": draw,
    "jit in jit": jax.jit(draw),
    "cond": lambda k: choose(jax.random.key_data(k)),
    "switch": lambda k: lax.switch(1, [lambda k: draw(k) * 2, draw], k),
    "checkpoint": jax.checkpoint(draw),
    "grad of checkpoint": rematerialised,
    "jvp": lambda k: jax.jvp(lambda x: x * draw(k), (jnp.ones(SHAPE),), (jnp.ones(SHAPE),))[1],
    "linearize": lambda k: jax.linearize(lambda x: x * draw(k), jnp.ones(SHAPE))[1](jnp.ones(SHAPE)),
    "vjp": lambda k: jax.vjp(lambda x: x * draw(k), jnp.ones(SHAPE))[1](jnp.ones(SHAPE))[0],
    "named_call": jax.named_call(draw, name="weights"),
    "eval_jaxpr": lambda k: jax.core.eval_jaxpr(*(lambda j: (j.jaxpr, j.consts))(jax.make_jaxpr(draw)(k)), k)[
        0
    ],
    "pmap": lambda k: jax.pmap(draw)(k[None])[0],
    "shard_map": lambda k: jax.shard_map(
        draw,
        mesh=jax.make_mesh((1,), ("a",)),
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
    )(k),
}
MODES = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "disable_jit": lambda f: within(jax.disable_jit(), f),
    "debug_nans": lambda f: within(jax.debug_nans(True), jax.jit(f)),
    "debug_infs": lambda f: within(jax.debug_infs(True), jax.jit(f)),
    "strict promotion": lambda f: within(jax.numpy_dtype_promotion("strict"), jax.jit(f)),
    "no rank promotion": lambda f: within(jax.numpy_rank_promotion("raise"), jax.jit(f)),
}


def within(context, function):
    def call(*arguments):
        with context:
            return jax.block_until_ready(function(*arguments))

    return call


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OF_A_KEY)
def test_one_key(name, mode):
    for seed in SEEDS[-2:]:
        assert same(MODES[mode](OF_A_KEY[name])(key(seed)), core(seed=seed))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 4), (5, 3), (2, 3, 5, 7), (1,) * 9])
def test_shapes_and_dtypes(shape, dtype):
    with jax.enable_x64(dtype == "float64"):
        made = jax.jit(lambda k: init(k, shape, dtype))(key())
        assert same(made, core(shape, dtype=dtype))
        many = jax.jit(jax.vmap(lambda k: init(k, shape, dtype)))(KEYS)
        assert many.shape == (len(SEEDS), *shape)
        assert all(same(many[i], core(shape, dtype=dtype, seed=seed)) for i, seed in enumerate(SEEDS))


def test_a_program_of_64_bits_beside_one_of_32():
    for wide in (False, True, False):
        with jax.enable_x64(wide):
            made = jax.jit(draw)(key())
            assert same(made, core(dtype="float64" if wide else "float32"))


def test_what_differs_but_for_the_key_is_no_one_array():
    """Names, fans, distributions and dtypes of one shape, in one program."""
    named = gpuinit.jax.initializers.initializer_of(gpuinit.he_normal, None, "w")
    inits = [
        (init, core()),
        (named, core(name="w")),
        (gpuinit.jax.he_uniform(), core(fill=gpuinit.he_uniform)),
        (gpuinit.jax.he_normal(in_axis=1, out_axis=0), core(in_axis=1, out_axis=0)),
        (gpuinit.jax.normal(0.5), core(fill=gpuinit.normal, stddev=0.5)),
        (gpuinit.jax.he_normal(dtype=jnp.bfloat16), core(dtype="bfloat16")),
    ]
    made = jax.jit(lambda k: [other(k, SHAPE) for other, _ in inits])(key())
    assert all(same(array, expected) for array, (_, expected) in zip(made, inits, strict=True))
    for other, expected in inits:
        assert same(jax.jit(lambda k, other=other: other(k, SHAPE))(key()), expected)


# Keeping a program


def test_ahead_of_time():
    lowered = jax.jit(draw).lower(key())
    assert "gpuinit_fill" in lowered.as_text()
    assert lowered.out_info.shape == SHAPE
    compiled = lowered.compile()
    assert same(compiled(key()), core())
    assert same(compiled(key(3)), core(seed=3))
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu",), ("cpu", "cuda")])
def test_lowering_for_another_platform(platforms):
    text = jax.jit(draw).trace(key()).lower(lowering_platforms=platforms).as_text()
    assert text.count("@gpuinit_fill") == 1
    assert "callback" not in text


def test_an_executable_is_pickled_and_loaded():
    from jax.experimental import serialize_executable

    pickled = pickle.dumps(serialize_executable.serialize(jax.jit(draw).lower(key()).compile()))
    loaded = serialize_executable.deserialize_and_load(*pickle.loads(pickled))
    assert same(loaded(key()), core())


def python(script, *arguments, devices=1, **environment):
    """Run it in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | environment
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


EXPORT = """
import sys, jax, gpuinit.jax
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_helpers import SHAPE
init = gpuinit.jax.he_normal()
checks = [jax.export.DisabledSafetyCheck.custom_call(gpuinit.jax.TARGET)]
sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("a",)), P("a"))
program = jax.jit(lambda k: init(k, SHAPE, None, sharding if jax.device_count() > 1 else None))
exported = jax.export.export(program, disabled_checks=checks, platforms=("cpu", "cuda"))(jax.random.key(7))
open(sys.argv[1], "wb").write(exported.serialize())
"""
IMPORT = """
import sys, hashlib, jax, numpy, gpuinit.jax
from jax.sharding import NamedSharding, PartitionSpec as P
everywhere = NamedSharding(jax.make_mesh((jax.device_count(),), ("a",)), P())
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
made = jax.jit(program.call)(jax.device_put(jax.random.key(7), everywhere))
print(len(made.addressable_shards), made.addressable_shards[0].data.shape)
print(hashlib.sha256(numpy.asarray(made).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("devices", [1, 4])
def test_an_exported_program_runs_in_another_process(tmp_path, devices):
    for script in (EXPORT, IMPORT):
        done = python(script, tmp_path / "program", devices=devices)
        assert done.returncode == 0, done.stderr
    shape, digest = done.stdout.splitlines()
    assert shape == f"{devices} {(SHAPE[0] // devices, SHAPE[1])}"
    assert digest == sha256(core(seed=7).tobytes()).hexdigest()
    done = python(IMPORT.replace(", gpuinit.jax", ""), tmp_path / "program", devices=devices)
    assert done.returncode != 0
    assert "gpuinit_fill" in done.stderr


CASES = [("he_normal", "float32"), ("he_uniform", "float32"), ("he_normal", "bfloat16")]
CACHE = """
import sys, hashlib, jax, numpy, gpuinit.jax
from jax.sharding import NamedSharding, PartitionSpec as P
from jax_helpers import SHAPE
folder, where, cases, key = *sys.argv[1:3], eval(sys.argv[3]), jax.random.key(7)
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", where == "out_shardings, by its flag")
sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("a",)), P("a"))
inside = sharding if where == "out_sharding" else None
outside = sharding if where.startswith("out_shardings") else None
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
for name, dtype in cases:
    init = getattr(gpuinit.jax, name)()
    events.clear()
    made = jax.jit(lambda k: init(k, SHAPE, dtype, inside), out_shardings=outside)(key)
    found = [event for event in events if event in ("cache_hits", "cache_misses")]
    print(*found, hashlib.sha256(numpy.asarray(made).tobytes()).hexdigest())
"""


@pytest.mark.parametrize(
    ("where", "devices", "again"),
    [
        ("one", 1, "hits"),
        ("out_sharding", 4, "hits"),
        ("out_shardings, by its flag", 4, "hits"),
        ("out_shardings", 4, "misses"),  # JAX has the address of a function in its key
    ],
)
def test_the_persistent_cache_of_compiled_programs(tmp_path, where, devices, again):
    digests = [
        sha256(core(fill=getattr(gpuinit, name), seed=7, dtype=dtype).tobytes()).hexdigest()
        for name, dtype in CASES
    ]
    for found in ("misses", again):
        done = python(CACHE, tmp_path, where, CASES, devices=devices)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"cache_{found} {digest}" for digest in digests]


# The key


def test_a_key_is_used_once_where_jax_checks_it():
    with jax.debug_key_reuse(True):
        for under in (lambda f: f, jax.jit):
            used = jax.random.key(1)
            under(draw)(used)
            with pytest.raises(jax.errors.KeyReuseError):
                under(draw)(used)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda k: draw(k) + draw(k))(jax.random.key(2))
        first, second = jax.random.split(jax.random.key(3))
        assert not (draw(first) == draw(second)).any()
        keys = jax.random.split(jax.random.key(4), 3)
        assert jax.vmap(draw)(keys).shape == (3, *SHAPE)
        assert lax.scan(lambda c, k: (c, draw(k)), 0, jax.random.split(jax.random.key(5), 3))[1].shape[0] == 3
        raw = jax.random.PRNGKey(6)
        assert same(draw(raw), np.asarray(jax.jit(draw)(raw)))


# What goes wrong


def test_an_error_of_the_fill_is_that_of_the_program(monkeypatch):
    program = jax.jit(draw)
    assert same(program(key()), core())
    for error, told in (
        (MemoryError("no room"), "RESOURCE_EXHAUSTED: gpuinit: MemoryError: no room"),
        (ValueError("not this\0way"), "INVALID_ARGUMENT: gpuinit: ValueError: not this way"),
        (OSError(5, "no such thing ü"), r"INTERNAL: gpuinit: OSError: \[Errno 5\] no such thing ü"),
        (KeyboardInterrupt(), "CANCELLED: gpuinit: KeyboardInterrupt: "),
        (SystemExit(3), "CANCELLED: gpuinit: SystemExit: 3"),
    ):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ffi, "fill_host", fail)
            with pytest.raises(Exception, match=told):
                program(key()).block_until_ready()
    assert same(program(key()), core())


@pytest.mark.parametrize(("name", "value"), [("GPUINIT_CPU_ENGINE", "fast"), ("GPUINIT_NUM_THREADS", "none")])
def test_a_wrong_setting_is_told(monkeypatch, name, value):
    program = jax.jit(lambda k: init(k, (2048, 1024)))
    monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match=f"gpuinit: ValueError: {name} must be .*got '{value}'"):
        program(key()).block_until_ready()


@pytest.mark.parametrize("text", ['{"format": 1}', "{}", "", "[1]"])
def test_a_program_of_another_version_is_refused(text):
    result = jax.ShapeDtypeStruct(SHAPE, np.float32)
    call = jax.jit(lambda words: jax.ffi.ffi_call(ffi.TARGET, result)(words, request=text))
    with pytest.raises(Exception, match="gpuinit: ") as raised:
        call(jnp.zeros(4, jnp.uint32)).block_until_ready()
    if "1}" in text:
        assert "must be made by a gpuinit of stream format 2, got 1" in str(raised.value)


def test_eight_threads_run_one_program():
    program = jax.jit(draw)
    wrong = []

    def work():
        wrong.extend(seed for seed in SEEDS * 20 if not same(program(key(seed)), core(seed=seed)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_the_handler_the_host_is_called_back(monkeypatch):
    monkeypatch.setattr(traced, "has_handler", lambda: False)
    jax.clear_caches()
    traced.by_partitioner.cache_clear()
    try:
        assert "callback" in str(jax.make_jaxpr(draw)(key()))
        for shape in (SHAPE, (), (0, 3)):
            assert same(jax.jit(lambda k, shape=shape: init(k, shape))(key()), core(shape))
        many = jax.jit(jax.vmap(jax.vmap(draw)))(KEYS[None])
        assert all(same(many[0, i], core(seed=seed)) for i, seed in enumerate(SEEDS))
    finally:
        jax.clear_caches()
        traced.by_partitioner.cache_clear()


# The end of the process

END = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp, gpuinit.jax
from gpuinit.jax import ffi
count, end = int(sys.argv[1]), sys.argv[2]
init = gpuinit.jax.he_normal()
program = jax.jit(lambda k: [init(jax.random.fold_in(k, i), (512, 1024)) for i in range(count)])
words = jax.random.key(0)
compiled = program.lower(words).compile()
jax.block_until_ready(words)
if end == "dropped":
    compiled(words)
elif end == "many":
    for _ in range(5): compiled(words)
elif end == "thread":
    kept = []
    thread = threading.Thread(target=lambda: kept.append(compiled(words)))
    thread.start(); thread.join()
elif end == "fork":
    kept = compiled(words)
    jax.block_until_ready(kept)
    parent = os.getpid()
    if os.fork() == 0: ffi.wait_for_programs(parent); os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
elif end == "guarded":
    jax.config.update("jax_transfer_guard", "disallow_explicit")
    compiled(words)
else:
    kept = compiled(words)
    if end == "exit": sys.exit(3)
    if end == "error": raise KeyError("an error")
"""


ENDS = ["kept", "dropped", "many", "thread", "exit", "error", "fork", "guarded"]


# XLA runs one array at once, sixty in threads of its own.
@pytest.mark.parametrize(("count", "end"), [(1, "kept"), *((60, end) for end in ENDS)])
def test_python_ends_while_a_program_runs(count, end):
    done = python(END, count, end)
    assert done.returncode == {"exit": 3, "error": 1}.get(end, 0), done.stderr
    assert "Traceback" not in done.stderr or end == "error"
    assert "KeyError: 'an error'" in done.stderr or end != "error"


def test_an_import_starts_no_backend_and_ends_in_silence():
    script = (
        "import gpuinit.jax; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


INTERRUPT = """
import os, signal, threading, time
import jax, gpuinit, gpuinit.jax, numpy as np
from gpuinit.jax import ffi
init = gpuinit.jax.he_normal()
program = jax.jit(lambda k: init(k, (4096, 2048)))
key = jax.random.key(7)
program(key).block_until_ready()
fill, begun = ffi.fill_host, threading.Event()

def slow(*arguments):
    begun.set()
    for _ in range(100): time.sleep(0.02)
    fill(*arguments)

ffi.fill_host = slow
threading.Thread(target=lambda: (begun.wait(), os.kill(os.getpid(), signal.SIGINT))).start()
try:
    program(key).block_until_ready()
    print("filled")
except BaseException as error:
    print(type(error).__name__, error)
ffi.fill_host = fill
print(np.asarray(program(key)).tobytes() == gpuinit.he_normal((4096, 2048), seed=7, device="cpu").tobytes())
"""


def test_an_interrupt_never_leaves_an_array_unwritten():
    done = python(INTERRUPT)
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.splitlines()
    assert "KeyboardInterrupt" in first
    assert again == "True"
