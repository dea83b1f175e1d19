"""torch's tensors on the devices of the suite. Imported by tests that have torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch


class SimTensor(torch.Tensor):
    """A tensor in host memory that says it is on the stand-in's second device."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 1)


class SimStream(NamedTuple):
    """What torch.cuda.current_stream gives where torch has CUDA."""

    device: torch.device

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x5EED + self.device.index


def placer(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "cuda-sim":
        monkeypatch.setattr(torch.cuda, "current_stream", SimStream)
        return lambda tensor: tensor.as_subclass(SimTensor)
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: this torch is built without CUDA")
    return lambda tensor: tensor.to("cuda" if name == "cuda" else "cpu")


def host(tensor: torch.Tensor) -> torch.Tensor:
    """A C-contiguous copy on the CPU."""
    return tensor.detach().as_subclass(torch.Tensor).cpu().resolve_neg().contiguous()


def tobytes(tensor: torch.Tensor | np.ndarray) -> bytes:
    """The elements in the order of their indices."""
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    return host(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()
