"""Where arrays are made and filled: one module for each kind of device, with the same two functions.

    empty(shape, dtype, device) -> array
    fill(out, runs, request) -> None

`out` is C-contiguous and one-dimensional; `runs` (gpuinit.stream.Run) are written one after another and
cover it. A backend knows nothing of fans, names or indices.
"""

from typing import Any

from gpuinit.quantile import Numbers

# Key, stream, distribution, its numbers (gpuinit.distributions). For gpuinit.backends.cuda the key may be a
# CuPy array on the device of `out`, where only the device knows it: four uint32, aligned to 16 bytes, for the
# key and for a number of elements that is added to the offset of every run, each with its high word first.
# They are read when the kernel runs, in the order of its stream.
Request = tuple[int | Any, int, int, Numbers]
