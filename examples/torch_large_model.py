"""A model too large for one device, initialised where it lies: the same weights on any number of ranks.

    torchrun --nproc-per-node 2 examples/torch_large_model.py
    torchrun --nproc-per-node 2 examples/torch_large_model.py --cpu-offload

The model is built on meta, without memory; fully_shard cuts it; to_empty makes each rank's shards, and
initialize_ fills them. No rank ever holds a whole parameter, and none waits for another. The last line, a
digest of all the weights, is the same for every number of ranks, on CPUs and GPUs, with and without
offload; only to print it are the parameters gathered, one at a time.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

import gpuinit.torch as gt


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.embed.weight


def main() -> None:
    parser = argparse.ArgumentParser(description="Initialise a sharded model.")
    parser.add_argument("--cpu-offload", action="store_true", help="keep the shards in host memory")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    arguments = parser.parse_args()

    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    show_weights(arguments, cuda)
    gc.collect()  # gloo may abort at exit where a model still holds the process group
    dist.barrier()
    dist.destroy_process_group()


def show_weights(arguments: argparse.Namespace, cuda: bool) -> None:
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=cuda) if arguments.cpu_offload else OffloadPolicy()

    with torch.device("meta"):
        model = Transformer(arguments.layers, arguments.width, arguments.tokens)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)
    model.to_empty(device="cuda" if cuda and not arguments.cpu_offload else "cpu")
    model.tie_weights()  # to_empty made two of them
    report = gt.initialize_(model, seed=0)

    digest = hashlib.sha256()
    for _, parameter in model.named_parameters():
        shard = parameter.detach()
        whole = (shard.cuda() if cuda else shard).full_tensor()
        digest.update(whole.cpu().view(torch.uint8).numpy().tobytes())
    if dist.get_rank() == 0:
        print(report)
        print(f"{dist.get_world_size()} ranks, digest {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
