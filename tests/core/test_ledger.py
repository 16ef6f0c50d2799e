"""The ledger balances, or says by how much it does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.ledger import Ledger, LedgerImbalance

counts = st.integers(0, 10**6)


@given(counts, counts, counts, st.dictionaries(st.text(max_size=5), counts))
def test_what_came_in_is_out_held_folded_or_dropped(
    out: int, held: int, folded: int, dropped: dict[str, int]
) -> None:
    ledger = Ledger()
    stage = ledger.stage("decode", "frames")
    stage.into = out + held + folded + sum(dropped.values())
    stage.out, stage.held, stage.folded = out, held, folded
    for cause, n in dropped.items():
        stage.drop(cause, n)
    ledger.check()
    assert ledger.snapshot()["decode"]["dropped"] == {c: n for c, n in dropped.items() if n}


@pytest.mark.parametrize("lost", [1, -1, 1000])
def test_a_single_unit_missing_is_a_bug_and_is_named(lost: int) -> None:
    ledger = Ledger()
    stage = ledger.stage("spool", "records")
    stage.into, stage.out = 2000 + lost, 2000
    with pytest.raises(LedgerImbalance, match=rf"spool: {lost} records"):
        ledger.check()
