"""examples/torch_*.py run, and show what they say they show; README.md's code for torch runs too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason='torch is not installed: pip install "gpuinit[torch]"')
pytest.importorskip("torch.distributed.tensor", reason="torch is built without torch.distributed")

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(example, ranks, options=()):
    """The lines, and the digest of the last one."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*start, str(EXAMPLES / example), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines, re.fullmatch(rf"{ranks} ranks, digest ([0-9a-f]{{16}})", lines[-1])[1]


def test_it_prints_one_digest_on_any_number_of_ranks():
    digests = []
    for ranks, options in ((1, []), (2, []), (2, ["--cpu-offload"])):
        lines, digest = run("torch_large_model.py", ranks, options)
        assert "27 parameters, 164,096 elements" in lines
        (row,) = [line for line in lines if line.startswith("embed.weight")]  # older ones of gloo print too
        assert re.fullmatch(r"embed\.weight +1000x64 +float32 +truncated_normal_ +0\.02", row)
        digests.append(digest)
    assert len(set(digests)) == 1


@pytest.mark.parametrize(
    ("library", "told"),
    [
        ("transformers", ["21 parameters, 220,480 elements", "Ran LlamaForCausalLM.initialize_weights."]),
        ("torchtitan", ["17 parameters, 2,753,792 elements", "Ran Llama3Model.init_states."]),
    ],
)
def test_a_llama_s_own_recipe_gives_the_same_weights_on_one_two_and_four_ranks(library, told):
    pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    digests = []
    for ranks in (1, 2, 4):
        lines, digest = run(f"torch_{library}_llama.py", ranks)
        assert set(told) <= set(lines)
        digests.append(digest)
    assert len(set(digests)) == 1


def test_the_readme_s_code_for_torch_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "import torch" in block]
    exec(compile(code, "README.md", "exec"), {})
