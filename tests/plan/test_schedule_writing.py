"""Schedules that are written: monotone, exact at the end, readable by what reads schedules."""

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.plan.schedule import read_schedule
from stepdown.plan.schedule_writing import SHAPES, as_csv, published_rows, rows_towards

ROOT = Path(__file__).parents[2]
PARTS = st.tuples(*[st.integers(0, 10**5)] * 3).filter(any)


@given(PARTS, st.integers(1, 40), st.sampled_from(list(SHAPES)), st.integers(0, 5))
def test_every_schedule_can_be_read_and_ends_at_its_target(tmp_path_factory, parts, iterations, shape, epochs):
    whole = sum(parts)
    dense, topk = (Decimal(parts[place] * 10**6 // whole) / 10**6 for place in (0, 2))
    target = (str(dense), str(1 - dense - topk), str(topk))
    path = tmp_path_factory.mktemp("schedule") / "schedule.csv"
    path.write_text(as_csv(rows_towards(target, iterations, shape, epochs)))
    rows = read_schedule(path)
    assert len(rows) == iterations and all(row.epochs == epochs for row in rows)
    last = rows[-1]
    assert tuple(map(Decimal, (last.dense, last.mid_2_4, last.topk))) == tuple(map(Decimal, target))


def test_shapes_are_those_of_the_papers():
    cubic = rows_towards(("0.2", "0.6", "0.2"), 4, "cubic", 1)
    expected = [Decimal("0.2") + Decimal("0.8") * (1 - Decimal(t) / 4) ** 3 for t in range(1, 5)]
    assert [Decimal(row["dense"]) for row in cubic] == [round(share, 4) for share in expected]
    linear = rows_towards(("0.2", "0.6", "0.2"), 4, "linear", 1)
    assert [row["dense"] for row in linear] == ["0.80", "0.60", "0.40", "0.20"]


def test_the_default_schedule_is_the_published_one():
    assert (ROOT / "config/progressive_schedule.csv").read_text() == as_csv(published_rows())


@pytest.mark.parametrize(
    ("target", "iterations", "epochs", "message"),
    [
        (("0.5", "0.6", "0.2"), 5, 2, "found a sum of 1.3"),
        (("a", "0.6", "0.2"), 5, 2, "dense is 'a'; write a share"),
        (("0.5", "-0.1", "0.6"), 5, 2, "mid_2_4 is '-0.1'"),
        (("0.5", "0.3", "0.2"), 0, 2, "found 0 iterations"),
        (("0.5", "0.3", "0.2"), 3, -1, "of -1 epochs"),
    ],
)
def test_wrong_targets_are_told_in_a_line(target, iterations, epochs, message):
    with pytest.raises(UserError) as caught:
        rows_towards(target, iterations, "cubic", epochs)
    assert message in str(caught.value) and "\n" not in str(caught.value)
