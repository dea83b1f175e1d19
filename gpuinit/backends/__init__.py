"""Where arrays are made and filled: one module for each kind of device, with the same two functions.

    empty(shape, dtype, device) -> array
    fill(out, runs, request) -> None

`out` is C-contiguous and one-dimensional; `runs` (gpuinit.stream.Run) are written one after another and
cover it. A backend knows nothing of fans, names or indices.
"""

from gpuinit.quantile import Numbers

Request = tuple[int, int, int, Numbers]  # key, stream, distribution, its numbers (gpuinit.distributions)
