"""Every crash that a power cut can leave of a spool and its start numbers, a hundred thousand of them.

More, and with another seed: `python -m tests.crash.explore --states N --seed S`.
"""

from __future__ import annotations

import pytest

from tests.crash.explore import explore

STATES = 100_000
SHARDS = 8  # so that every core has its share


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_cut_loses_invents_or_renames_a_committed_record(shard: int) -> None:
    assert explore(STATES // SHARDS, seed=shard).states >= STATES // SHARDS
