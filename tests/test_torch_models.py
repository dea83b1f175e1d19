"""Real models' own recipes in streams: what they draw, and that nothing else changes it.

A few of the models of benchmarks/torch_models.py, which makes the table of all; its checks are these.
"""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')
pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
pytest.importorskip("torch.distributed.tensor", reason="torch is built without torch.distributed")

import model_zoo  # noqa: E402
import torch_models  # noqa: E402

# Each has something that the others have not.
MODELS = {
    "gpt2": "weights of (in, out), projections scaled by depth, a tied head",
    "llama": "a padding row",
    "gemma2": "norms that are 0 at first",
    "mixtral": "stacks of experts",
    "mamba": "biases computed from random numbers",
    "t5": "three names of one table",
    "bert": "a tied bias",
    "vit": "tokens and position embeddings",
    "whisper": "a frozen table of sinusoids",
    "wav2vec2": "a normed weight",
    "torchtitan llama3": "parts of a fused weight, drawn on temporaries",
}
DISTRIBUTED = ("gpt2", "llama", "mamba")
RUNS = 4

# Not ours: transformers draws the normed weight of wav2vec2 on a copy, so only its constructor draws it.
NEVER_WRITTEN = {"wav2vec2": "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight."}

# Nor this: the table is tied to a head, the recipe draws it for both, and zeroes the padding row for one. In
# streams that depends on their order; initialize_ sets the row afterwards.
TIED_AND_PADDED = {
    "gemma2": "model.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
    "whisper": "model.decoder.embed_tokens.weight",
}


@pytest.fixture(params=MODELS)
def name(request):
    """A model that has been built once: what its library warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        why = torch_models.missing(request.param)
    if why:
        pytest.skip(why)
    return request.param


def of_recipe(name, names):
    """Without what the recipe never writes."""
    return [key for key in names if not key.startswith(NEVER_WRITTEN.get(name, "-"))]


def test_the_recipe_draws_in_streams_what_it_draws_without_them(name):
    found = torch_models.compare(model_zoo.MODELS[name], RUNS)
    assert found["drawn"] > 5
    assert of_recipe(name, found["not drawn by us"]) == []
    assert of_recipe(name, found["other constants"]) == []
    assert of_recipe(name, found["misfits"]) == []


def test_neither_order_nor_seeds_of_torch_nor_a_second_run_change_a_weight(name):
    found = torch_models.siblings(model_zoo.MODELS[name])
    assert of_recipe(name, found["not written"]) == []
    changed = {way: found[way] for way in torch_models.SIBLINGS if found[way]}
    padded = TIED_AND_PADDED.get(name)
    assert changed == ({"the recipe run in streams": [padded]} if padded else {})


def test_a_model_without_streams_of_its_own_is_found_out():
    """The checks themselves: torch's generators, in place of streams, fail them."""
    make = model_zoo.MODELS["gpt2"]

    def plain(model, seed):
        torch.manual_seed(seed)
        model_zoo.recipe(model)

    model = make()
    plain(model, 0)
    expected = torch_models.digests(model)
    with torch_models.backwards():
        plain(model, 0)
    assert len(torch_models.changed(model, expected)) > 5


def test_two_ranks_of_fully_shard_make_the_weights_of_one_process():
    found = torch_models.in_world(2, list(DISTRIBUTED), lambda: None)
    assert found == {name: {"2 ranks": {"parameters": [], "buffers": []}} for name in DISTRIBUTED}
