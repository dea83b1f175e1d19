"""The golden digests. Changing one is a breaking change: tools/golden.py says what goes with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import golden
import pytest

HERE = Path(__file__).parent

TABLE = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
ROWS = TABLE["arrays"]


@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['function']}" for i, row in enumerate(ROWS)])
def test_device_gives_the_golden_bytes(device, row):
    weights = device.numpy(golden.make(row, device=device.name))
    assert hashlib.sha256(weights.tobytes()).hexdigest() == row["sha256"]


def test_the_table_covers_every_case_and_no_two_are_alike():
    keys = ("function", "arguments", "keywords")
    table = [{key: row[key] for key in keys} for row in ROWS]
    assert table == json.loads(json.dumps(golden.cases()))
    assert len({row["sha256"] for row in ROWS}) == len(ROWS)


def test_the_changelog_names_the_format():
    changelog = (HERE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"Stream format {TABLE['format']}" in changelog
