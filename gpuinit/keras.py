"""Keras 3: its initialisers with the bits of gpuinit, the same on every backend, and whole models.

    Dense(64, activation="relu", kernel_initializer=gpuinit.keras.HeNormal(seed=0))
    gpuinit.keras.initialize(model, seed=0)    every variable its own stream, keyed by its path

The classes are subclasses of Keras's own, with their arguments, their configuration and their seeds; only the
draw differs. `HeNormal(seed=n)(shape)` has the bits of `gpuinit.he_normal(shape, seed=n)`. A seed that is an
integer or None gives the same weights on every call of one instance, as in Keras: two layers of one shape
that share it start equal. Give each its own, or a `keras.random.SeedGenerator`, or use `initialize`.

The tensor is one of the active backend, on its device: on a GPU made there through CuPy and not copied. With
the JAX backend and a `keras.distribution`, every device makes its own shard.

In a `tf.function` the host makes the weights. For a SeedGenerator it does so anew in every run; for an
integer or None once, as a constant, or in every run where they take more than 16 MiB. What is made in every
run can neither be compiled by XLA (jit_compile=True) nor be loaded from a SavedModel by another process: draw
outside of the function there. `torch.compile` breaks its graph at a draw.

Import gpuinit.keras before a saved model that has these classes is loaded; without it Keras cannot interpret
them, and says so. In what was saved when `class_name` was Keras's own, it would take its own in their place.

The classes have Keras's lower-case names too, `he_normal` for `HeNormal`. Zeros, Ones and Constant are
Keras's own; of the others of `keras.initializers`, Orthogonal, Identity and STFT are not offered,
nor are `get` and its relatives, which know Keras's classes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from operator import itemgetter
from types import FunctionType
from typing import Any, SupportsIndex

import numpy as np

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise
    raise ImportError(
        'gpuinit.keras needs Keras. To install it: pip install "gpuinit[keras]", and one of its backends'
    ) from error

from keras import initializers, layers
from keras.initializers import Constant, Ones, Zeros, constant, ones, zeros

from gpuinit.distributions import (
    TRUNCATED_STD,
    Draw,
    draw_of,
    is_real,
    parse_normal,
    parse_recipe,
    parse_uniform,
)
from gpuinit.fans import DEFAULT_AXES, fans
from gpuinit.initializers import DTYPES, find_draw, make, parse_dtype
from gpuinit.memory import empty_aligned
from gpuinit.rules import (
    NAMES_SHOWN,
    Report,
    Row,
    Rule,
    Uncovered,
    find_rule,
    noting,
    parse_rules,
    refuse_uncovered,
    spare_frozen,
)
from gpuinit.stream import as_integer, as_integers, parse_seed, parse_shape

__all__ = [
    "DEFAULT_RULES",
    "Constant",
    "GlorotNormal",
    "GlorotUniform",
    "HeNormal",
    "HeUniform",
    "LecunNormal",
    "LecunUniform",
    "Ones",
    "RandomNormal",
    "RandomUniform",
    "Report",
    "Row",
    "TruncatedNormal",
    "VarianceScaling",
    "Zeros",
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "initialize",
    "lecun_normal",
    "lecun_uniform",
    "ones",
    "random_normal",
    "random_uniform",
    "truncated_normal",
    "variance_scaling",
    "zeros",
]


def register(kind: Any) -> Any:
    """A class that Keras saves as "gpuinit>HeNormal", in both of the fields that it reads.

    By `class_name`, which is `__name__`, it would find its own HeNormal where gpuinit.keras is not imported,
    and take that in silence; a name that it does not know is an error. Pickle and repr use `__qualname__`.
    """
    kind = keras.saving.register_keras_serializable(package="gpuinit")(kind)
    kind.__name__ = keras.saving.get_registered_name(kind)
    return kind


class Drawn:
    """The call that all share. A subclass has `draw`, which says what is drawn for a shape."""

    draw: Callable[[tuple[int, ...]], Draw]

    def __call__(self, shape: Any, dtype: Any = None, layout: Any = None) -> Any:
        """A tensor of the active backend.

        Args:
            shape: Shape of the whole tensor.
            dtype: "float32", "float16", "bfloat16" or "float64"; None is `keras.config.floatx()`.
            layout: With the JAX backend, a `keras.distribution.TensorLayout` or a sharding: every device
                makes its own shard.

        Raises:
            TypeError, ValueError: An argument that cannot be used.
            ValueError: The seed is a SeedGenerator where its next state would be lost: under a transformation
                of JAX without a `keras.StatelessScope`, or in what make_fx, torch.export or torch.jit.trace
                traces.
        """
        return as_written(self.named)(shape, dtype, layout, self.seed, None)  # type: ignore[attr-defined]

    def named(self, shape: Any, dtype: Any, layout: Any, seed: Any, name: str | None) -> Any:
        """The same, from a seed and the stream of a name."""
        parsed = parse_shape(shape)
        made_of = standardize_dtype(dtype)
        fill = partial(make, draw=self.draw(parsed))
        find_draw(fill, parsed, dtype=parse_dtype(made_of), name=name)  # an error costs no seed
        return tensor(fill, parsed, made_of, layout, seed_of(seed), name)

    def get_config(self) -> dict[str, Any]:
        """Keras's, with a number for each 0-d array: Keras cannot bring these back from a file."""
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return {word: float(value) if is_real_scalar(value) else value for word, value in config.items()}


@register
class VarianceScaling(Drawn, initializers.VarianceScaling):  # type: ignore[misc]
    """Weights of variance scale / fan: as `keras.initializers.VarianceScaling`.

    distribution is "truncated_normal", also called "normal" as in Keras, "untruncated_normal" or "uniform".
    With input_axes and output_axes, as in Keras, the fans are the products of those axes and no others count:
    `DepthwiseConv2D` has kernels (height, width, channels, multiplier), and needs input_axes=(0, 1),
    output_axes=(0, 1, 3) for the fan_in that each of its outputs has.
    """

    def draw(self, shape: tuple[int, ...]) -> Draw:
        """Scale, mode and fans, by the core's rule."""
        if self.input_axes is not None and self.output_axes is not None:
            fan_in = size_of(shape, "input_axes", self.input_axes)
            fan_out = size_of(shape, "output_axes", self.output_axes)
        else:
            fan_in, fan_out = fans(shape, *DEFAULT_AXES)
        return draw_of(parse_recipe(self.scale, self.mode, self.distribution), fan_in, fan_out)


@register
class HeNormal(VarianceScaling, initializers.HeNormal):  # type: ignore[misc]
    """Truncated He-normal weights, std = sqrt(2 / fan_in): as `keras.initializers.HeNormal`."""


@register
class HeUniform(VarianceScaling, initializers.HeUniform):  # type: ignore[misc]
    """Uniform He weights, limit = sqrt(6 / fan_in): as `keras.initializers.HeUniform`."""


@register
class GlorotNormal(VarianceScaling, initializers.GlorotNormal):  # type: ignore[misc]
    """Truncated Glorot-normal weights, std = sqrt(2 / (fan_in + fan_out)): as in `keras.initializers`."""


@register
class GlorotUniform(VarianceScaling, initializers.GlorotUniform):  # type: ignore[misc]
    """Uniform Glorot weights, limit = sqrt(6 / (fan_in + fan_out)): as in `keras.initializers`."""


@register
class LecunNormal(VarianceScaling, initializers.LecunNormal):  # type: ignore[misc]
    """Truncated LeCun-normal weights, std = sqrt(1 / fan_in): as `keras.initializers.LecunNormal`."""


@register
class LecunUniform(VarianceScaling, initializers.LecunUniform):  # type: ignore[misc]
    """Uniform LeCun weights, limit = sqrt(3 / fan_in): as `keras.initializers.LecunUniform`."""


@register
class RandomNormal(Drawn, initializers.RandomNormal):  # type: ignore[misc]
    """A normal distribution that is not cut, whatever the fans: as `keras.initializers.RandomNormal`."""

    def draw(self, shape: tuple[int, ...]) -> Draw:
        """mean + stddev * z, z from the unit normal; the errors are those of `gpuinit.normal`."""
        return parse_normal(self.stddev, self.mean)


@register
class TruncatedNormal(Drawn, initializers.TruncatedNormal):  # type: ignore[misc]
    """The same, cut at two standard deviations from the mean: as `keras.initializers.TruncatedNormal`."""

    def draw(self, shape: tuple[int, ...]) -> Draw:
        """mean + stddev * z, z from the unit normal truncated to [-2, 2]; stddev is that before the cut."""
        return parse_normal(self.stddev, self.mean, -2.0, 2.0)


@register
class RandomUniform(Drawn, initializers.RandomUniform):  # type: ignore[misc]
    """A uniform distribution, whatever the fans: as `keras.initializers.RandomUniform`."""

    def draw(self, shape: tuple[int, ...]) -> Draw:
        """In [minval, maxval], finite numbers in order; both can be reached, or the number before."""
        return parse_uniform((self.minval, self.maxval), names=("minval", "maxval"))


glorot_normal = GlorotNormal
glorot_uniform = GlorotUniform
he_normal = HeNormal
he_uniform = HeUniform
lecun_normal = LecunNormal
lecun_uniform = LecunUniform
random_normal = RandomNormal
random_uniform = RandomUniform
truncated_normal = TruncatedNormal
variance_scaling = VarianceScaling


def standardize_dtype(dtype: Any) -> str:
    """Keras's own, whose errors do not name the argument."""
    try:
        return str(keras.backend.standardize_dtype(dtype))
    except (TypeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}") from None


def is_real_scalar(value: Any) -> bool:
    """Whether it is a 0-d array of real numbers, of any library."""
    return getattr(value, "shape", None) == () and is_real(value)


def size_of(shape: tuple[int, ...], argument: str, axes: Any) -> int:
    """Product of the lengths of these axes."""
    wanted = f"{argument} must be axes in [-{len(shape)}, {len(shape)}) for shape {shape}"
    found = as_integers(axes, wanted)
    if not all(-len(shape) <= axis < len(shape) for axis in found):
        raise ValueError(f"{wanted}, got {axes!r}")
    return prod(shape[axis] for axis in found)


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which neither TensorFlow's AutoGraph nor torch.compile then translates."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.autograph.experimental.do_not_convert(function)  # type: ignore[no-any-return]
    if backend == "torch":
        from gpuinit.tensors import outside_graphs

        return outside_graphs(function)
    return function


# A seed


def seed_of(seed: Any) -> Any:
    """The 64 bits of one call, as Keras's own draws them, or where these are not known yet the two words.

    An integer is itself. The state of a SeedGenerator is two words of 32 bits, its seed and a count; the
    first is the low one, so that its first draw is that of the integer. What is traced is a tensor: under
    JAX's jit, in a tf.function and on torch's meta device.
    """
    if not isinstance(seed, keras.random.SeedGenerator):
        return parse_seed(as_integer(seed, "seed must be an integer in [0, 2**64)", seed))
    words = next_words(seed)
    return words if is_symbolic(words) else from_words(keras.ops.convert_to_numpy(words))


def from_words(words: Any) -> int:
    low, high = (int(word) % 2**32 for word in words)  # torch's are signed
    return low | high << 32


def next_words(seed: Any) -> Any:
    """What `seed.next()` gives, where that can be."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        from gpuinit.jax.arrays import is_traced

        if is_traced():
            if not isinstance(seed.state.value, jax.core.Tracer) and not in_stateless_scope():
                # The traced next state would stay in the generator and outlive the trace.
                raise ValueError(
                    "seed must be an integer under jit and other transformations of JAX, or a SeedGenerator "
                    "in a keras.StatelessScope that has its state, got a SeedGenerator outside of one"
                )
        elif not jax.sharding.get_abstract_mesh().empty:
            # Keras asks for a variable of a distribution where all axes of its mesh are explicit, and those
            # of the generator's state, on the same devices or others, are not.
            with jax.set_mesh(None):
                return seed.next()
    if backend == "torch":
        import torch
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        if get_proxy_mode() is not None or torch.jit.is_tracing():
            raise ValueError(
                "seed must be an integer in what make_fx, torch.export or torch.jit.trace traces, where the "
                "weights are a constant, got a SeedGenerator"
            )
    return seed.next()


def in_stateless_scope() -> bool:
    with keras.StatelessScope(initialize_variables=False) as scope:
        outer = scope.original_scope
    return outer is not None


def is_symbolic(words: Any) -> bool:
    """Whether their values are not known now."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(words, jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return backend == "torch" and bool(words.is_meta)


# The tensors of each backend


def tensor(
    fill: Callable[..., Any], shape: tuple[int, ...], dtype: str, layout: Any, seed: Any, name: str | None
) -> Any:
    """Filled, on the device of the active backend."""
    backend = keras.backend.backend()
    if backend == "jax":
        return jax_array(fill, shape, dtype, layout, seed, name)
    made = partial(fill, shape, name=name, dtype=dtype)
    if backend == "torch":
        return torch_tensor(made, shape, dtype, seed)
    if backend == "tensorflow":
        return tensorflow_tensor(made, shape, dtype, seed)
    array = made(seed=seed, device="cpu")
    return array if backend == "numpy" else keras.ops.convert_to_tensor(array)


def jax_array(
    fill: Callable[..., Any], shape: tuple[int, ...], dtype: str, layout: Any, seed: Any, name: str | None
) -> Any:
    import jax
    from jax.sharding import NamedSharding, Sharding

    from gpuinit.jax.arrays import sharded
    from gpuinit.jax.initializers import initializer_of

    sharding = getattr(layout, "backend_layout", layout)
    if not isinstance(sharding, Sharding | None):
        raise TypeError(
            f"layout must be a keras.distribution.TensorLayout or a jax.sharding.Sharding, got {layout!r}"
        )
    if isinstance(seed, jax.Array):
        words = seed[::-1]
    elif isinstance(sharding, NamedSharding | None):
        words = np.array([seed >> 32, seed % 2**32], np.uint32)
    else:
        return sharded(shape, sharding, fill, seed=seed, name=name, dtype=dtype)
    return initializer_of(fill, dtype, name)(words, shape, None, sharding)


def torch_tensor(make: Callable[..., Any], shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
    import torch

    device = keras.ops.convert_to_tensor(0.0).device
    if device.type == "meta":
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    array = make(seed=seed, device=f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu")
    taken = torch.from_dlpack(bits_of(array)).to(device)
    return taken.view(torch.bfloat16) if dtype == "bfloat16" else taken


def tensorflow_tensor(make: Callable[..., Any], shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
    import tensorflow as tf

    if not tf.executing_eagerly():
        return graph_tensor(make, shape, dtype, seed)
    place = re.search(r"GPU:(\d+)$", tf.zeros(()).device)
    if place is None:
        array = make(seed=seed, out=empty_aligned(shape, DTYPES[dtype]))
    else:
        array = make(seed=seed, device=f"cuda:{place[1]}")
        if isinstance(array, np.ndarray):
            return tf.convert_to_tensor(array)
        array.device.synchronize()  # TensorFlow's DLPack knows no streams
    # It takes a capsule of the first kind, which is what __dlpack__ gives to who names no version.
    taken = tf.experimental.dlpack.from_dlpack(bits_of(array).__dlpack__())
    return tf.bitcast(taken, dtype) if dtype == "bfloat16" else taken


# The size of a constant in bytes. TensorFlow copies one some ten times, and all those of a function must stay
# under 2 GiB together; but XLA and a SavedModel take nothing else.
LARGEST_CONSTANT = 2**24


def graph_tensor(make: Callable[..., Any], shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
    """Made by the host: now, as a constant, or by a call of the host whenever the graph runs."""
    import tensorflow as tf

    if not tf.is_tensor(seed):
        if prod(shape) * DTYPES[dtype].itemsize <= LARGEST_CONSTANT:
            return tf.convert_to_tensor(make(seed=seed, device="cpu"))
        seed = tf.constant([seed % 2**32, seed >> 32], tf.int64)

    def host(words: np.ndarray) -> np.ndarray:
        out: np.ndarray = make(seed=from_words(words), out=empty_aligned(shape, DTYPES[dtype]))
        return out

    # The name stands in the errors of TensorFlow that say that XLA cannot compile the call.
    made = tf.numpy_function(host, [seed], dtype, stateful=False, name="gpuinit_weights_made_by_the_host")
    return tf.ensure_shape(made, shape)


def bits_of(array: Any) -> Any:
    """The array, but bfloat16 as integers: NumPy's DLPack does not know it."""
    return array.view(np.int16) if array.dtype == DTYPES["bfloat16"] else array


# Whole models

DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
KERNELS = (
    *(layers.Dense, layers.EinsumDense, layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(*DEPTHWISE, *SEPARABLE, *TRANSPOSED),
)
NORMS = (
    *(layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization),
    layers.RMSNormalization,
)
EMBEDDINGS = ("embeddings", "reverse_embeddings")
CELLS = (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)


def he_normal_of(layer: Any) -> HeNormal:
    """He-normal with the fans that the kernel of this layer has."""
    if isinstance(layer, layers.EinsumDense):  # as Keras reads its equation
        _, kernel, output = re.split(",|->", re.sub(r"\s|\.\.\.", "", layer.equation))
        input_axes = [axis for axis, letter in enumerate(kernel) if letter not in output]
        output_axes = [axis for axis, letter in enumerate(kernel) if letter in output]
        return HeNormal(input_axes=input_axes, output_axes=output_axes)
    spatial = list(range(getattr(layer, "rank", 0)))
    if isinstance(layer, (*DEPTHWISE, *SEPARABLE)):  # (*spatial, channels, multiplier): one channel in
        return HeNormal(input_axes=spatial, output_axes=[*spatial, -1])
    if isinstance(layer, TRANSPOSED):  # (*spatial, out, in)
        return HeNormal(input_axes=[*spatial, -1], output_axes=[*spatial, -2])
    return HeNormal()


def glorot_uniform_of_gate(kernel: str) -> Callable[[Any], RandomUniform]:
    """Glorot uniform for a kernel (*field, inputs, gates * units) of a cell, with the fans of one gate.

        limit = sqrt(6 / (field * (inputs + units)))

    The gates stand side by side for speed alone; Keras counts the outputs of all as fan_out. For a recurrent
    kernel, inputs = units, the variance is 1 / (field * units), without a field that of the elements of an
    orthogonal matrix. Keras draws one of those over all gates, by a QR decomposition, whose bits differ
    between devices.
    """

    def of_cell(cell: Any) -> RandomUniform:
        *field, inputs, _ = getattr(cell, kernel).shape
        units = cell.units if isinstance(cell, CELLS) else cell.filters
        limit = math.sqrt(6 / (prod(field) * (inputs + units)))
        return RandomUniform(-limit, limit)

    return of_cell


def bias_of_cell(cell: Any) -> Zeros | Constant:
    """0, but 1 in the forget gate, the second of four, of an LSTM with unit_forget_bias, as in Keras."""
    if not getattr(cell, "unit_forget_bias", False):
        return Zeros()
    return Constant(np.repeat(np.array([0, 1, 0, 0], np.float32), cell.bias.shape[0] // 4))


def cells_own(*names: str) -> Callable[[Any, str], bool]:
    """True for variables of recurrent cells. Keras does not export ConvLSTMCell."""
    return lambda layer, path: (
        path.rpartition("/")[2] in names
        and (isinstance(layer, CELLS) or any(base.__name__ == "ConvLSTMCell" for base in type(layer).__mro__))
    )


def variable_of(types: Any, *names: str) -> Callable[[Any, str], bool]:
    """True for variables of these layers that have one of these names of their own."""
    return lambda layer, path: isinstance(layer, types) and path.rpartition("/")[2] in names


DEFAULT_RULES: tuple[Rule, ...] = (
    (variable_of(SEPARABLE, "pointwise_kernel"), HeNormal()),
    (variable_of(KERNELS, "kernel", "depthwise_kernel"), he_normal_of),
    (variable_of(KERNELS, "bias"), "zeros"),
    (cells_own("kernel"), glorot_uniform_of_gate("kernel")),
    (cells_own("recurrent_kernel"), glorot_uniform_of_gate("recurrent_kernel")),
    (cells_own("bias"), bias_of_cell),
    (variable_of(NORMS, "gamma", "scale", "moving_variance", "moving_stddev", "renorm_stddev"), "ones"),
    (variable_of(NORMS, "beta", "moving_mean", "renorm_mean"), "zeros"),
    # 0.02 is the standard deviation of the weights, after truncation.
    (variable_of(layers.Embedding, *EMBEDDINGS), TruncatedNormal(stddev=0.02 / TRUNCATED_STD)),
    # As Keras has them; an AdditiveAttention is an Attention too.
    (variable_of(layers.PReLU, "alpha"), "zeros"),
    (variable_of(layers.AdditiveAttention, "scale"), GlorotUniform()),
    (variable_of(layers.Attention, "scale", "concat_score_weight"), "ones"),
    (variable_of(layers.SpectralNormalization, "vector_u"), TruncatedNormal(stddev=0.02)),
)


def initialize(
    model: Any, seed: SupportsIndex = 0, rules: Sequence[Rule] | None = None, *, strict: bool = True
) -> Report:
    """Fill every weight of a built model, each from a stream of its own, keyed by its path.

    The path is that of Keras, "dense/kernel" or "sequential/dense/kernel". Adding a layer changes no other
    weight, and no two are alike. The bits are those of `gpuinit.he_normal(shape, seed=seed, name=path)`, on
    every backend. Keras numbers the names that it gives itself through the whole process ("dense_1"): name
    the layers and the model, or call `keras.utils.clear_session()` before building it, where a second model
    of one process shall start like the first.

    Where weights share a path, as do those of two models of one architecture inside the model, the name of
    each is its path after the names of the layers that hold its own: "left//conv/kernel". What Keras has
    made up among these, "functional_7", counts as "functional(0)", by its place among such in the graph, and
    as "functional" in a layer that has no graph. A glob may have either, the path or the name; a function
    is asked about the name.

    The default rules are `DEFAULT_RULES`:

        Dense, EinsumDense, Conv, ...   kernel He-normal, bias 0
        DepthwiseConv, SeparableConv,   the same, with the fans that
        ConvTranspose                   these have; Keras's are wrong
        LSTM, GRU, SimpleRNN, ConvLSTM  both kernels Glorot uniform with the fans of one gate (Keras: of
                                        all, and orthogonal); bias 0, of an LSTM's forget gate 1
        BatchNormalization, ...         gamma 1, beta 0, moving statistics 0 and 1
        Embedding                       truncated normal, standard deviation 0.02
        PReLU, Attention                alpha 0; scale 1, of an AdditiveAttention Glorot uniform
        SpectralNormalization           vector_u truncated normal, as in Keras

    Args:
        model: A built `keras.Model` or layer.
        seed: An integer in [0, 2**64).
        rules: Pairs (pattern, initialiser), of which the first that fits is taken. A pattern is a glob on the
            path ("*/gate/kernel"), or a function (layer, path) -> bool, given the layer that owns the
            variable. An initialiser is what `keras.initializers.get` takes, with the seed and the path in
            place of its own seed if it is one of this module's, or a function layer -> initialiser. To add to
            the default rules: [(pattern, initialiser), *DEFAULT_RULES].
        strict: False leaves a weight alone that no rule covers. Weights that are not trainable are left alone
            then in any case. Those of a frozen layer, whose trainable is False, are left alone unless a rule
            of the caller fits them that says more than "*".

    Returns:
        A row for every weight: name, shape, dtype, rule and standard deviation; `print` shows a table.

    Raises:
        ValueError: No rule covers a trainable weight, and strict.
        ValueError: Weights to be drawn share a path, and the names of the layers that hold theirs too.
        TypeError, ValueError: An initialiser of this module cannot draw a weight, or what a rule has is none.
            Nothing is written in either case; only one from elsewhere that fails does so when called.
    """
    return as_written(fill_model)(model, seed, rules, strict)  # type: ignore[no-any-return]


def fill_model(model: Any, seed: SupportsIndex, rules: Sequence[Rule] | None, strict: bool) -> Report:
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model must be a keras.Model or keras.Layer, got {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"model must be built; call it once, or give it an Input, got {model.name!r} unbuilt"
        )
    key = parse_seed(as_integer(seed, "seed must be an integer in [0, 2**64)", seed))
    chosen = parse_rules(DEFAULT_RULES if rules is None else rules)
    owners = {}
    # Parents first, so that the innermost stays, wherever a layer that is shared was met first.
    for layer in sorted(model._flatten_layers(), key=lambda layer: -len(layer._flatten_layers())):
        owners.update({id(variable): layer for variable in layer.weights})
    naming = spare_frozen(chosen, DEFAULT_RULES)
    names = names_of(model, owners)
    plan = []
    for variable in model.weights:
        owner, name = owners[id(variable)], names[id(variable)]
        plan.append((variable, *choose(chosen if owner.trainable else naming, owner, variable, name, key)))
    if strict:
        refuse_uncovered(
            [
                Uncovered(row.name, row.shape, type(owners[id(variable)]).__name__)
                for variable, initializer, row in plan
                if row.written == "not written" and variable.trainable
            ]
        )
    refuse_equal([row.name for _, initializer, row in plan if isinstance(initializer, Drawn)])
    for variable, initializer, row in plan:
        fill(variable, initializer, row, key)
    return Report([row for _, _, row in plan])


def names_of(model: Any, owners: dict[int, Any]) -> dict[int, str]:
    """The name of each variable, by its id: its path, if that is shared after the layers around its own."""
    count = Counter(variable.path for variable in model.weights)
    places = places_of(model) if len(count) < len(model.weights) else {}
    names = {}
    for variable in model.weights:
        place = places[id(owners[id(variable)])] if count[variable.path] > 1 else ""
        names[id(variable)] = f"{place}/{variable.path}" if place else variable.path
    return names


def places_of(model: Any) -> dict[int, str]:
    """The names of the layers around each, "left/block/", by its id; the shortest of its ways down."""
    places, level = {id(model): ""}, [("", model)]
    while level:
        below = [
            (f"{place}{name}/", place, layer) for place, outer in level for name, layer in named_layers(outer)
        ]
        level = []
        for inside, place, layer in sorted(below, key=itemgetter(0)):
            if id(layer) not in places:
                places[id(layer)] = place
                level.append((inside, layer))
    return places


def named_layers(outer: Any) -> list[tuple[str, Any]]:
    """The layers right inside of one, each with its name.

    The number in a name that Keras has made up counts what the process has built. In its place is the
    position in the graph, among those of the class, if there is a graph: the order of attributes is none.
    """
    graph = outer.layers if isinstance(outer, keras.Function | keras.Sequential) else []
    named, count = [], Counter[str]()
    for layer in graph:
        kind = kind_of(layer)
        named.append((f"{kind}({count[kind]})" if kind else layer.name, layer))
        count[kind] += 1
    in_graph = {id(layer) for layer in graph}
    return named + [
        (kind_of(layer) or layer.name, layer) for layer in outer._layers if id(layer) not in in_graph
    ]


def kind_of(layer: Any) -> str:
    """Its name without the number, "dense" for "dense_7", if Keras has made it up; else empty."""
    from keras.src.utils.naming import to_snake_case

    kind: str = to_snake_case(type(layer).__name__)
    return kind if re.fullmatch(rf"{kind}(_\d+)?", layer.name) else ""


def refuse_equal(names: list[str]) -> None:
    """Raise where weights that are drawn have one name."""
    found = [f"{count} named {name}" for name, count in Counter(names).items() if count > 1]
    if found:
        more = [f"and {len(found) - NAMES_SHOWN} more"] if len(found) > NAMES_SHOWN else []
        raise ValueError(
            "model must have a name for each weight, as equal names give equal weights; name the weights or "
            "the layers that hold them apart (names like those that Keras makes up, dense_1, do not count), "
            f"or initialize the layers one by one, a seed each, got {', '.join(found[:NAMES_SHOWN] + more)}"
        )


def choose(rules: list[Rule], owner: Any, variable: Any, name: str, key: int) -> tuple[Any, Row]:
    """The initialiser of one variable, or None, and its row. What can be checked is, and nothing is made."""
    shape, dtype = tuple(variable.shape), keras.backend.standardize_dtype(variable.dtype)
    std = None
    with noting(f"This is variable {name}."):
        initializer = find_rule(rules, owner, *dict.fromkeys((variable.path, name)))
        if isinstance(initializer, FunctionType):
            initializer = initializer(owner)
        initializer = initializers.get(initializer)
        if isinstance(initializer, Drawn):
            draw = initializer.draw(shape)
            std = find_draw(make, shape, draw=draw, seed=key, name=name, dtype=dtype).std()
        elif isinstance(initializer, Zeros | Ones | Constant):
            std = 0.0
    rule = "-" if initializer is None else type(initializer).__qualname__.rpartition(".")[2]
    written = "whole" if initializer is not None else "not written" if owner.trainable else "frozen"
    return initializer, Row(name, shape, dtype, rule, std, written)


def fill(variable: Any, initializer: Any, row: Row, key: int) -> None:
    layout, place = place_of(variable)
    with noting(f"This is variable {row.name}."), place:
        if isinstance(initializer, Drawn):
            variable.assign(initializer.named(row.shape, row.dtype, layout, key, row.name))
        elif initializer is not None:
            variable.assign(initializer(row.shape, row.dtype))


def place_of(variable: Any) -> tuple[Any, AbstractContextManager[Any]]:
    """With JAX, which moves a variable to where its new value is: its layout, and a scope of its device."""
    if keras.backend.backend() == "jax":
        import jax

        value = variable.value
        if not isinstance(value, jax.core.Tracer):
            devices = value.devices()
            scope = jax.default_device(*devices) if len(devices) == 1 else nullcontext()
            return value.sharding if value.committed else None, scope
    return None, nullcontext()
