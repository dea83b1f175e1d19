"""Graphs of torch's operations, made by torch.compile, make_fx or torch.export. A fill is none of these."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Let torch.compile break its graph at a function, and run it as it is."""

    @wraps(function)
    def call(*args: P.args, **words: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():
            # Not as a decorator, since that imports all of the compiler.
            as_it_is: Callable[P, T] = torch.compiler.disable(function, reason="a fill is in no graph")
            return as_it_is(*args, **words)
        return function(*args, **words)

    return call


def refuse_traced(tensor: torch.Tensor) -> None:
    """Raise where the graph or the transform that is made would miss the fill, in silence."""
    if get_proxy_mode() is not None or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise RuntimeError(
            "tensor must be filled outside of what make_fx, torch.export or torch.func traces, "
            f"as a fill is no operation of torch's, got a traced {type(tensor).__name__}"
        )
