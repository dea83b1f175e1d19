"""One recipe, one seed: the same weights in one process and on any ranks, without a collective."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')
pytest.importorskip("torch.distributed.tensor", reason="torch is built without torch.distributed")

import torch_stream_worlds  # noqa: E402
from torch_stream_worlds import SEED  # noqa: E402
from torch_worlds import digest  # noqa: E402

import gpuinit.torch as gt  # noqa: E402


@pytest.fixture(scope="module", params=[1, 2, 4])
def world(request, tmp_path_factory):
    """What every process of a world found."""
    folder = tmp_path_factory.mktemp("world")
    torch.multiprocessing.spawn(torch_stream_worlds.run, (request.param, str(folder)), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    """The parameters that gpuinit's functions make in this process, by the names of their streams."""
    empty, same = torch.empty, {"seed": SEED}
    found = {
        "embed.weight": gt.init.normal_(empty(11, 8), name="embed.weight", **same),
        "fused": torch.cat(
            [
                gt.init.normal_(empty(6, 8), name="fused.#0", **same),
                gt.init.uniform_(empty(6, 8), 0, 1 - 2**-24, name="fused.#1", **same) * 2,
            ]
        ),
        "decay": gt.init.uniform_(empty(5), 1, 16, name="decay.#0", **same) * 2,
        "like": gt.init.normal_(empty(5, 2), name="like.#0", **same),
        "one": gt.init.kaiming_uniform_(empty(1, 8, dtype=torch.bfloat16), name="one", **same),
        "table": gt.init.uniform_(empty(9), name="table", **same),
    }
    for block in ("blocks.0.", "blocks.1."):
        bound = 13**-0.5
        found |= {
            block + "up.weight": gt.init.trunc_normal_(
                empty(13, 8), std=0.02, name=block + "up.weight", **same
            ),
            block + "up.bias": torch.zeros(13),
            block + "down.weight": gt.init.kaiming_uniform_(
                empty(8, 13), 5**0.5, name=block + "down.weight", **same
            ),
            block + "down.bias": gt.init.uniform_(empty(8), -bound, bound, name=block + "down.bias", **same),
            block + "norm.weight": torch.ones(8),
            block + "norm.bias": torch.zeros(8),
        }
    return {name: digest(tensor) for name, tensor in found.items()}


def test_every_world_and_every_sharding_makes_the_same_weights(world, alone):
    kinds = {"bare", "fully_shard"}
    if len(world) == 4:
        kinds |= {"hybrid sharding, 2x2", "tensor parallel and fully_shard"}
    for found in world:
        assert set(found["models"]) == kinds
        for kind in kinds:
            assert found["models"][kind]["digests"] == alone, kind


def test_every_rank_has_the_report_of_one_process(world):
    for found in world:
        for kind, model in found["models"].items():
            assert model["report"] == world[0]["models"]["bare"]["report"], kind
    written = {row[0]: row[5] for row in world[0]["models"]["bare"]["report"]}
    assert {name for name, how in written.items() if how == "temporary"} == {"fused", "decay", "like"}
    assert {name for name, how in written.items() if how != "temporary"} == {
        name for name in written if name not in ("fused", "decay", "like")
    }


def test_views_of_a_sharded_parameter(world):
    expected = digest(gt.init.normal_(torch.empty(6, 8), seed=SEED, name="w"))
    for found in world:
        for name in ("whole", "local", "columns", "transposed", "local rows", *ACROSS):
            assert found["draws"][name].split()[0] == expected, name


ACROSS = ("rows by number", "row slices", "row chunks")


def test_a_write_to_a_slice_across_the_shards_is_not_lost(world):
    """torch gathers such a slice, and forgets what is written to it, as transformers does to padding rows."""
    padded, scaled = (gt.init.normal_(torch.empty(6, 8), seed=SEED, name="w") for _ in range(2))
    padded[4] = 0
    scaled[1:3] *= 2
    for found in world:
        assert found["draws"]["a padding row"].split()[0] == digest(padded)
        assert found["draws"]["a scaled row"].split()[0] == digest(scaled)
        for name in ("a copied row", "a row of rows", "every other row") if len(world) > 1 else ():
            assert found["draws"][name].startswith(
                "ValueError: a write to a part of a sharded parameter must be"
            ), name


def test_parts_from_temporaries_are_those_of_a_plain_parameter(world):
    plain = torch.nn.Module()
    plain.w = torch.nn.Parameter(torch.empty(6, 8))
    with gt.streams(plain, SEED), torch.no_grad():
        torch_stream_worlds.columns_from_temporaries(plain.w)
    rows = gt.init.normal_(torch.empty(6, 8), seed=SEED, name="w")[2:3].repeat(6, 1)
    rows[2] *= 2
    for found in world:
        assert found["draws"]["columns from temporaries"].split()[0] == digest(plain.w)
        if len(world) > 1:  # else the row is no copy
            assert found["draws"]["a row that is read again"].split()[0] == digest(rows)


def test_what_is_gathered_before_it_reaches_a_parameter_is_refused(world):
    for found in world:
        for name in ("gathered", "a slice of a temporary") if len(world) > 1 else ():
            assert found["draws"][name].startswith("ValueError: random numbers must not be gathered"), name


def test_what_each_rank_would_draw_for_its_own_shard_is_refused(world):
    """All ranks draw the same on a plain temporary; their shards would be copies of each other."""
    for found in world:
        for name in ("given to a shard", "given to a shard later", "a shard of its own", "distributed"):
            assert found["draws"][name].startswith(
                "ValueError: random numbers on a plain temporary must not become one rank's shard"
            ), name
        assert "seed must be given for a model with DTensors" in found["seed"]
