"""Low-rank adapters (LoRA) of PEFT and torchtune: what fills them, and which of PEFT's only PEFT can fill.

An adapter starts as nothing: B is 0, so that the model computes what it did without it.

References: Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022; Liu et al., "DoRA:
Weight-decomposed low-rank adaptation", ICML 2024; `reset_lora_parameters` of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from gpuinit.tensors import is_fake
from gpuinit.torch.fill import TORCH_DTYPES, checking
from gpuinit.torch.init import kaiming_uniform_, normal_
from gpuinit.torch.names import is_kind, walk
from gpuinit.torch.shards import is_dtensor, memory

MAGNITUDES = "lora_magnitude_vector"  # DoRA's
KNOWN = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", MAGNITUDES)


def factor(*words: str, parameter: str = "weight") -> Callable[[nn.Module, str], bool]:
    """True for a linear or convolutional factor: PEFT has a dict of them, torchtune one of its own."""

    def fits(module: nn.Module, name: str) -> bool:
        *_, above, own, last = ("", "", *name.split("."))
        is_layer = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return is_layer and last == parameter and (above in words or own in words)

    return fits


def table(word: str) -> Callable[[nn.Module, str], bool]:
    """True for a factor of an embedding, which PEFT has in a dict of parameters."""
    return lambda module, name: isinstance(module, nn.ParameterDict) and f".{name}".split(".")[-2] == word


def is_factor(name: str) -> bool:
    """Whether a parameter is in what is called an adapter of LoRA, known here or not."""
    return any(part.startswith("lora_") for part in name.split(".")[:-1])


def magnitude(module: Any, name: str) -> bool:
    """True for the magnitudes of a DoRA layer whose base has weights that can be read."""
    base = find_base(module, name)
    return base is not None and base.dtype in TORCH_DTYPES and memory(base).layout is torch.strided


def find_base(layer: Any, name: str) -> Any:
    """The weight that a DoRA layer takes apart, or None where the parameter is not its magnitude."""
    if is_kind(layer, "torchtune", "DoRALinear") and name.rpartition(".")[2] == "magnitude":
        return layer.weight
    if is_lora(layer) and f".{MAGNITUDES}." in f".{name}":
        base = layer.get_base_layer()
        return getattr(base, "weight", None)
    return None


def dora_magnitude_(tensor: torch.Tensor, *, name: str, module: Any) -> None:
    """The norm of the base's weights for each output, as B is 0: W = magnitude * W / |W|.

    It is a sum, in float64, of what the base holds, drawn or loaded; its bits may differ between devices.
    """
    base = find_base(module, name)
    part = dict(getattr(module, MAGNITUDES, {})).get(name.removesuffix(".weight").rpartition(".")[2])
    axis = 1 if getattr(part, "fan_in_fan_out", False) else 0  # a table, or Conv1D: (in, out)
    if base.shape[axis] != tensor.numel() or is_fake(memory(base)) != is_fake(memory(tensor)):
        raise ValueError(
            f"the base must have {tensor.numel()} outputs and lie in memory, for its norms, got shape "
            f"{tuple(base.shape)} on {base.device}"
        )
    if checking.get() or is_fake(memory(tensor)):
        return
    weights = base.full_tensor() if is_dtensor(base) else base.detach()
    others = [other for other in range(weights.ndim) if other != axis]
    norms = torch.linalg.vector_norm(weights, dim=others, dtype=torch.float64)
    tensor.copy_(norms.reshape(tensor.shape).to(tensor.device))


# Of a linear layer, a convolution or an embedding, whose factor A is what is looked up.
ADAPTER_RULES = (
    (factor("lora_A", "lora_a"), partial(kaiming_uniform_, a=math.sqrt(5))),
    (factor("lora_B", "lora_b"), nn.init.zeros_),
    (factor("lora_B", "lora_b", parameter="bias"), nn.init.zeros_),
    (table("lora_embedding_A"), nn.init.zeros_),
    (table("lora_embedding_B"), normal_),
    (magnitude, dora_magnitude_),
)


def is_lora(layer: nn.Module) -> bool:
    """Whether a layer is PEFT's, with factors A and B, not AdaLoRA's of three."""
    return is_kind(layer, "peft", "LoraLayer") and not is_kind(layer, "peft", "AdaLoraLayer")


def tuners(module: nn.Module) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """PEFT's layers, their prefixes, and how each of their adapters was to be initialised."""
    inits: dict[str, Any] = {}
    for prefix, part in walk(module):
        configs = vars(part).get("peft_config")  # the model has it, and not its layers
        if isinstance(configs, dict):
            inits |= {name: getattr(config, "init_lora_weights", True) for name, config in configs.items()}
        if is_kind(part, "peft", "BaseTunerLayer"):
            yield prefix, part, inits


def magnitude_owners(module: nn.Module) -> dict[nn.Module, nn.Module]:
    """The layers to which the magnitudes of DoRA belong, which PEFT has in modules of their own."""
    return {
        kept: layer
        for _, layer, _ in tuners(module)
        if is_lora(layer)
        for kept in getattr(layer, MAGNITUDES, nn.ModuleDict()).modules()
    }


def left_to_peft(module: nn.Module) -> tuple[str, ...]:
    """How the names of those adapters begin that the default rules do not know: all but LoRA, and LoRA whose
    factors are not those of PEFT's default, such as PiSSA's, which were made from the base. Layers that are
    trained beside the adapters are copies of the base's, too.
    """
    found = []
    for prefix, layer, inits in tuners(module):
        for word, adapters in layer.named_children():
            if not (is_lora(layer) and word in KNOWN):
                found += [] if word == "base_layer" else [f"{prefix}{word}."]
                continue
            names = [name for name in adapters if inits.get(name, True) is not True]
            found += [f"{prefix}{word}.{name}." for name in names]
    found += [
        f"{prefix}prompt_encoder." for prefix, part in walk(module) if is_kind(part, "peft", "PeftModel")
    ]
    found += [
        f"{prefix}modules_to_save."
        for prefix, part in walk(module)
        if is_kind(part, "peft", "AuxiliaryTrainingWrapper")
    ]
    return tuple(found)


def check_adapters(module: nn.Module) -> None:
    """Raise where a recipe would overwrite what was made from the base."""
    for prefix, layer, inits in tuners(module):
        for name in layer.lora_A if is_lora(layer) else ():
            if inits.get(name, True) not in (True, False, "gaussian"):
                raise ValueError(
                    'recipe must be a function where PEFT makes adapters from the base, got "own" for '
                    f"{prefix}lora_A.{name} of init_lora_weights={inits[name]!r}"
                )


def reset_adapters(module: nn.Module) -> list[str]:
    """What PEFT and torchtune do to a new adapter, after all else is reset; what is to be said of it."""
    notes = []
    for _, layer, inits in tuners(module):
        for name in dict.fromkeys((*layer.lora_A, *layer.lora_embedding_A)) if is_lora(layer) else ():
            layer.reset_lora_parameters(name, inits.get(name, True))
            notes.append(f"Ran reset_lora_parameters of adapter {name}.")
            for own, parameter in layer.named_parameters():
                if find_base(layer, own) is not None and own.split(".")[1] == name:
                    dora_magnitude_(parameter, name=own, module=layer)
    for _, part in walk(module):
        if is_kind(part, "torchtune", "AdapterModule") and hasattr(part, "initialize_parameters"):
            part.initialize_parameters()
            notes.append("Ran initialize_parameters of adapters.")
            if hasattr(part, "initialize_dora_magnitude"):
                part.initialize_dora_magnitude()
    return list(dict.fromkeys(notes))
