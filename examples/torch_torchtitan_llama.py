"""A llama of torchtitan, sharded, with torchtitan's own recipe: the same weights on any number of ranks.

    torchrun --nproc-per-node 1 examples/torch_torchtitan_llama.py
    torchrun --nproc-per-node 4 examples/torch_torchtitan_llama.py

Its `init_states` draws truncated normals whose standard deviation falls with the depth of the layer, and
makes the three projections of attention apart before it writes them into one weight.
initialize_(recipe="own") finds it, and gives every draw the stream of the parameter that it reaches.
"""

from __future__ import annotations

import gc
import hashlib
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.models.llama3 import model_registry

import gpuinit.torch as gt


def main() -> None:
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    show_weights("cuda" if cuda else "cpu")
    gc.collect()  # gloo may abort at exit where a model still holds the process group
    dist.barrier()
    dist.destroy_process_group()


def show_weights(device: str) -> None:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    config = model_registry("debugmodel").model
    config.layers = config.layers[:2]
    with torch.device("meta"):
        model = config.build()
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    report = gt.initialize_(model, seed=0, recipe="own")

    digest = hashlib.sha256()
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    if dist.get_rank() == 0:
        print(report)
        print(f"{dist.get_world_size()} ranks, digest {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
