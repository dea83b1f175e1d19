"""A llama of transformers, sharded, with transformers' own recipe: the same weights on any number of ranks.

    torchrun --nproc-per-node 1 examples/torch_transformers_llama.py
    torchrun --nproc-per-node 4 examples/torch_transformers_llama.py

Built on meta, cut by fully_shard, given memory by to_empty, then initialize_(recipe="own") runs what
transformers runs: normal weights of standard deviation 0.02, norms of 1, and the frequencies of the rotary
embedding. With torch's own generator the weights would change with the number of ranks.
"""

from __future__ import annotations

import gc
import hashlib
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import gpuinit.torch as gt

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


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
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    report = gt.initialize_(model, seed=0, recipe="own")

    digest = hashlib.sha256()
    for _, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.detach().cpu().view(torch.uint8).numpy().tobytes())
    if dist.get_rank() == 0:
        print(report)
        print(f"{dist.get_world_size()} ranks, digest {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
