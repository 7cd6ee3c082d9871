"""The schedule file: what a good one gives, and one clear line for each way it can be wrong."""

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.plan.schedule import one_shot, read_schedule

DEFAULT = Path(__file__).parents[2] / "config/progressive_schedule.csv"
HEADER = "iteration,dense,mid_2_4,topk,dense_to_2_4,mid_2_4_to_topk,epochs"


@pytest.fixture
def write(tmp_path):
    def write(*lines, header=HEADER, encoding="utf-8"):
        path = tmp_path / "schedule.csv"
        path.write_bytes("\n".join([header, *lines]).encode(encoding))
        return path

    return write


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("schedules/*.csv")), ids=lambda path: path.stem)
def test_the_other_schedules_end_where_the_default_does(path):
    default, other = (read_schedule(path)[-1] for path in (DEFAULT, path))
    assert (default.dense, default.mid_2_4, default.topk) == (other.dense, other.mid_2_4, other.topk)


def test_the_default_schedule():
    rows = read_schedule(DEFAULT)
    assert [(row.dense, row.mid_2_4, row.topk) for row in rows] == [
        ("0.9", "0.1", "0"),
        ("0.8", "0.1", "0.1"),
        ("0.65", "0.2", "0.15"),
        ("0.5", "0.3", "0.2"),
        ("0.35", "0.45", "0.2"),
    ]
    assert [row.dense_to_2_4 for row in rows] == ["0.1", "0.1", "0.15", "0.15", "0.15"]
    assert [row.mid_2_4_to_topk for row in rows] == ["0", "0.1", "0.05", "0.05", "0"]
    assert [row.epochs for row in rows] == [2, 2, 2, 2, 3]


def test_one_shot_has_the_last_shares_and_all_epochs():
    row = one_shot(read_schedule(DEFAULT))
    assert (row.iteration, row.dense, row.mid_2_4, row.topk, row.epochs) == (1, "0.35", "0.45", "0.2", 11)
    assert (row.dense_to_2_4, row.mid_2_4_to_topk) == ("0.65", "0.2")


def test_the_way_a_number_is_written_does_not_matter(write):
    plain = read_schedule(write("1,0.90,0.10,0.00,0.10,0.00,2"))
    assert read_schedule(write("1, .9, 0.1, 0, , -, 2", "", ",,,,,,")) == plain
    assert read_schedule(write("1,0.9,0.10,0.,-,,2\r", encoding="utf-8-sig")) == plain
    assert read_schedule(write("2,1,0.9,0.1,0", header="epochs,iteration,dense,mid_2_4,topk")) == plain


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 9)), min_size=1, max_size=30))
def test_every_schedule_that_only_steps_down_is_read_exactly(tmp_path_factory, draws):
    dense, topk, lines = 1000, 0, []
    for step, next_step, epochs in draws:
        dense -= step % (dense + 1)
        topk += next_step % (1000 - dense - topk + 1)
        lines.append((dense, 1000 - dense - topk, topk, epochs))
    shares = [[str(Decimal(share) / 1000) for share in line[:3]] for line in lines]
    path = tmp_path_factory.mktemp("schedule") / "schedule.csv"
    body = [f"{i},{','.join(row)},{line[3]}" for i, (row, line) in enumerate(zip(shares, lines, strict=True), start=1)]
    path.write_text("\n".join(["iteration,dense,mid_2_4,topk,epochs", *body]))
    rows = read_schedule(path)
    assert [[Decimal(row.dense), Decimal(row.mid_2_4), Decimal(row.topk)] for row in rows] == [
        [Decimal(share) for share in row] for row in shares
    ]
    assert sum(Decimal(row.dense_to_2_4) for row in rows) == 1 - Decimal(rows[-1].dense)
    assert sum(Decimal(row.mid_2_4_to_topk) for row in rows) == Decimal(rows[-1].topk)


GOOD = "1,0.9,0.1,0,,,2"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "no rows below the header"),
        (["1,0.9,0.2,0,,,2"], "row 1, columns dense, mid_2_4, topk: found a sum of 1.1"),
        (["1,0.9,0.1,0.000002,,,2"], "must sum to 1"),
        (["1,90,10,0,,,2"], "row 1, column dense: found '90'; write a share from 0 to 1"),
        (["1,nan,0.1,0,,,2"], "column dense: found 'nan'"),
        (["1,0.9,-0.1,0.2,,,2"], "column mid_2_4: found '-0.1'"),
        (["1,0.9,1e-1,0,,,2"], "column mid_2_4: found '1e-1'"),
        (["1,0.9,0.1,,,,2"], "column topk: found ''"),
        ([GOOD, "2,0.95,0.05,0,,,2"], "row 2, column dense: found 0.95 after 0.9"),
        (["1,0.8,0.1,0.1,,,2", "2,0.8,0.15,0.05,,,2"], "row 2, column topk: found 0.05 after 0.1"),
        (["1,0.9,0.1,0,0.2,,2"], "row 1, column dense_to_2_4: found 0.2; the shares make it 0.1"),
        (["1,0.9,0.1,0,,0.1,2"], "row 1, column mid_2_4_to_topk: found 0.1; the shares make it 0"),
        ([GOOD, "3,0.8,0.1,0.1,,,2"], "row 2, column iteration: found 3; number the rows"),
        (["0,0.9,0.1,0,,,2"], "row 1, column iteration: found 0"),
        (["one,0.9,0.1,0,,,2"], "row 1, column iteration: found 'one'"),
        (["1,0.9,0.1,0,,,-1"], "row 1, column epochs: found '-1'; write a whole number"),
        (["1,0.9,0.1,0,,,1.5"], "row 1, column epochs: found '1.5'"),
        (["1,0.9,0.1,0,2"], "row 1: found 5 cells under 7 columns"),
        (["1,0.9,0.1,0,,,2,8"], "row 1: found 8 cells under 7 columns"),
    ],
)
def test_a_wrong_row_is_one_clear_line(write, lines, told):
    assert told in error_of(write(*lines))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (HEADER.replace("topk,d", "top_k,d"), "unknown column 'top_k'; did you mean topk?"),
        (HEADER.replace(",epochs", ""), "column epochs is missing"),
        (HEADER.replace("topk,d", "dense,d"), "column dense stands twice"),
        (HEADER + ",colour", "unknown column 'colour'; the columns are"),
        ("", "unknown column '1'"),
    ],
)
def test_a_wrong_header_is_one_clear_line(write, header, told):
    assert told in error_of(write(GOOD, header=header))


def test_what_is_no_csv_file_is_one_clear_line(tmp_path):
    assert "No such file" in error_of(tmp_path / "nowhere.csv")
    assert "directory" in error_of(tmp_path)
    empty = tmp_path / "empty.csv"
    empty.touch()
    assert "column iteration is missing" in error_of(empty)
    garbled = tmp_path / "garbled.csv"
    garbled.write_bytes(b"\xff\xfe\x00\x01,,\x80")
    assert "decode" in error_of(garbled)
    garbled.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "only a pointer of git-lfs" in error_of(garbled)


def error_of(path):
    with pytest.raises(UserError) as caught:
        read_schedule(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message
