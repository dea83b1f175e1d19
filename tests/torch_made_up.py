"""A device that torch learns of in this process, and what is tried on it. No test is here.

`python torch_made_up.py` prints, as JSON, the traceback of every trial, or null. Its memory can be reached by
torch's operations alone: a tensor has no address and no NumPy array, so what takes it for the host's fails.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch_devices import tobytes

import gpuinit.torch as gt
from gpuinit.torch import fill

SCRATCH = 64
late: list[tuple[torch.Tensor, torch.Tensor]] = []
sent: list[int] = []


class Device(torch.Tensor):
    """A tensor on the device, whose memory is that of `there`."""

    @staticmethod
    def __new__(cls, there: torch.Tensor) -> Device:
        words = {"strides": there.stride(), "storage_offset": there.storage_offset(), "dtype": there.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, there.shape, **words, device="made_up")
        tensor.there = there
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.copy_.default and not isinstance(args[1], Device):
            source = args[1]
            assert source.is_contiguous()
            sent.append(source.numel())
            if args[2:] or kwargs.get("non_blocking"):  # read whenever the device comes to it
                late.append((args[0].there, source))
                return args[0]
        tensors = [arg.there if isinstance(arg, Device) else arg for arg in args]
        result = function(*tensors, **kwargs)
        return args[0] if result is tensors[0] else Device(result)


class Made(TorchDispatchMode):
    """The elements of what is made on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or function is torch.ops.aten.copy_.default):
            self.elements.append(result.numel())
        return result


def there(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor on the device holds, once the device has done all."""
    while late:
        target, source = late.pop()
        target.copy_(source)
    return tensor.detach().there


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T.clone(memory_format=torch.contiguous_format).T,
    "columns of a larger one": lambda tensor: torch.cat([tensor, tensor], 1)[:, 3 : 3 + tensor.shape[1]],
}


def the_bits_of_every_function_and_layout() -> None:
    functions = [getattr(gt, name) for name in gt.__all__ if name.endswith("_") and name != "initialize_"]
    for function in functions:
        for dtype in fill.TORCH_DTYPES:
            for layout in LAYOUTS.values():
                tensor = Device(layout(torch.full((23, 9), 9.0, dtype=dtype)))
                sent.clear()
                counted = Made()
                counted.elements = []
                with counted:
                    assert function(tensor, seed=3, name="w") is tensor
                expected = function(torch.empty(23, 9, dtype=dtype), seed=3, name="w")
                assert tobytes(there(tensor)) == tobytes(expected), (function, dtype)
                assert sum(sent) == 23 * 9
                assert max(sent) <= SCRATCH
                assert counted.elements == [SCRATCH]


def only_the_elements_of_a_view() -> None:
    whole = torch.full((20, 30), 9.0)
    gt.uniform_(Device(whole)[3:9, 2:25], seed=0)
    assert (whole[3:9, 2:25].abs() <= 0.05).all()
    whole[3:9, 2:25] = 9.0
    assert (whole == 9.0).all()


def scalars_and_nothing() -> None:
    tensor = Device(torch.tensor(9.0))
    assert there(gt.normal_(tensor, seed=3)).item() == gt.normal_(torch.empty(()), seed=3).item()
    sent.clear()
    state = torch.get_rng_state()
    for name in ("he_normal_", "uniform_"):
        getattr(gt, name)(Device(torch.empty(0, 4)))
    assert sent == []
    assert torch.equal(state, torch.get_rng_state())


def a_parameter_records_nothing_and_the_seed_is_torch_s() -> None:
    torch.manual_seed(5)
    expected = gt.he_normal_(torch.empty(7, 5))
    torch.manual_seed(5)
    parameter = nn.Parameter(Device(torch.zeros(7, 5)))
    version = parameter._version
    assert gt.he_normal_(parameter) is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter._version > version
    assert torch.equal(there(parameter), expected)


def a_model() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 30), nn.Conv2d(4, 6, 3), nn.LayerNorm(5))

    model, twin = make(), make()
    for module in model:
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(Device(parameter.detach().clone())))
    assert str(gt.initialize_(model, 3)) == str(gt.initialize_(twin, 3))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(there(one), other)


def a_dtensor() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = DeviceMesh("made_up", [0, 1])
        for axis, mine in ((0, slice(10, None)), (1, slice(9, None))):
            whole = gt.he_normal_(torch.empty(20, 18), seed=3)
            local = Device(torch.zeros(20, 18)[(slice(None),) * axis + (mine,)].clone())
            tensor = DTensor.from_local(local, mesh, [Shard(axis)], run_check=False)
            gt.he_normal_(tensor, seed=3)
            assert torch.equal(there(tensor.to_local()), whole[(slice(None),) * axis + (mine,)])
    finally:
        dist.destroy_process_group()


def a_fake_one_is_left_alone() -> None:
    with FakeTensorMode():
        tensor = torch.empty(3, 4, device="made_up")
    state = torch.get_rng_state()
    assert gt.he_normal_(tensor) is tensor
    assert torch.equal(state, torch.get_rng_state())


TRIALS = (
    the_bits_of_every_function_and_layout,
    only_the_elements_of_a_view,
    scalars_and_nothing,
    a_parameter_records_nothing_and_the_seed_is_torch_s,
    a_model,
    a_dtensor,
    a_fake_one_is_left_alone,
)

if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    _setup_privateuseone_for_python_backend("made_up")
    fill.SCRATCH = SCRATCH
    found: dict[str, str | None] = {}
    for trial in TRIALS:
        try:
            trial()
            found[trial.__name__] = None
        except Exception:
            found[trial.__name__] = traceback.format_exc()
    print(json.dumps(found))
