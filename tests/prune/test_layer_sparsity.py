"""Sparsity by layer: the sum comes out, the table counts, and outliers are spared as published."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepdown.errors import UserError
from stepdown.prune.layer_sparsity import by_outliers, by_table, in_whole_units, matches, outlier_shares, uniform

SIZES = {
    f"model.layers.{layer}.{name}": size
    for layer in range(12)
    for name, size in (("self_attn.q_proj", 4096), ("mlp.up_proj", 11008), ("mlp.down_proj", 11008))
}


def overall(sizes, sparsities):
    return sum(sizes[name] * sparsity for name, sparsity in sparsities.items()) / Fraction(sum(sizes.values()))


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("layers.0-5", "model.layers.5.mlp.up_proj", True),
        ("layers.0-5", "model.layers.6.mlp.up_proj", False),
        ("layers.1", "model.layers.11.mlp.up_proj", False),
        ("mlp.*", "model.layers.11.mlp.up_proj", True),
        ("*_proj", "model.layers.11.mlp.up_proj", True),
        ("layers.*.mlp", "model.layers.11.mlp.up_proj", True),
        ("up_proj", "model.layers.11.mlp.up_proj", True),
        ("up", "model.layers.11.mlp.up_proj", False),
        ("mlp.layers", "model.layers.11.mlp.up_proj", False),
    ],
)
def test_patterns_of_names(pattern, name, found):
    assert matches(pattern, name) is found


@given(st.integers(300, 700), st.integers(0, 999), st.integers(0, 999))
def test_the_table_meets_the_overall_sparsity_exactly(whole, first, second):
    table = {"layers.0-1": first / 1000, "layers.2.mlp": f"{second / 1000}"}
    sparsities = by_table(SIZES, Fraction(whole, 1000), table)
    assert overall(SIZES, sparsities) == Fraction(whole, 1000)
    assert sparsities["model.layers.1.mlp.up_proj"] == Fraction(first, 1000)
    assert sparsities["model.layers.2.mlp.up_proj"] == Fraction(second, 1000)
    assert sparsities["model.layers.2.self_attn.q_proj"] == sparsities["model.layers.9.mlp.up_proj"]


@given(st.integers(1, 999), st.integers(0, 400), st.integers(20, 200))
def test_in_whole_units_the_sum_still_comes_out(whole, reach, units):
    layers = {f"model.layers.{layer}": (layer % 5) / 10 for layer in range(12)}
    try:
        wanted = by_outliers(SIZES, Fraction(whole, 1000), layers, reach / 1000)
    except UserError:
        return
    found = in_whole_units(SIZES, wanted, dict.fromkeys(SIZES, units))
    assert all((share * units).denominator == 1 and 0 <= share < 1 for share in found.values())
    # No more is lost than what the last matrix of each of five sparsities is rounded by.
    lost = sum(SIZES[name] * (wanted[name] - found[name]) for name in SIZES)
    if all(Fraction(1, units) < share < 1 - Fraction(2, units) for share in wanted.values()):
        assert abs(lost) <= 5 * Fraction(max(SIZES.values()), 2 * units)


def test_the_table_alone_if_told_so():
    sparsities = by_table(SIZES, Fraction(1, 2), {"layers.0-5": 0.3}, meet_overall=False)
    assert set(sparsities.values()) == {Fraction(3, 10), Fraction(1, 2)}


def test_of_several_lines_the_last_counts_and_what_is_not_pruned_may_have_0():
    table = {"embed": 0, "lm_head": 0, "layers": 0.2, "q_proj": 0.4}
    sparsities = by_table(SIZES, Fraction(1, 2), table, meet_overall=False)
    assert sparsities["model.layers.0.self_attn.q_proj"] == Fraction(2, 5)
    assert sparsities["model.layers.0.mlp.up_proj"] == Fraction(1, 5)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"lm_head": 0.5}, "found lm_head, which matches no matrix to prune; write parts of such as model.layers.0."),
        ({"layers.0": 1}, "layers.0: a sparsity of 1, not from 0 to below 1; write another"),
        ({"layers.0": -0.1}, "layers.0: a sparsity of -0.1"),
        ({"mlp": 0.0}, "what it leaves to the other matrices: a sparsity of 3.1"),
        ({"mlp": 0.9}, "a sparsity of -1.65, not from 0 to below 1; change the table, or set layer_sparsity.meet"),
        ({"layers": 0.4}, "names every matrix, and they sum to 0.4, not 0.5"),
    ],
)
def test_a_table_that_cannot_be_met(table, words):
    with pytest.raises(UserError) as caught:
        by_table(SIZES, Fraction(1, 2), table)
    assert str(caught.value).startswith("config key layer_sparsity.table: ") and words in str(caught.value)


def test_a_table_that_names_every_matrix_and_meets_the_sum():
    assert by_table(SIZES, Fraction(1, 2), {"layers": 0.5}) == uniform(SIZES, Fraction(1, 2))


def published_owl(outliers, sparsity, reach):
    """https://github.com/luuyin/OWL: shares scaled to [0, 2 lambda], their mean moved to the density; in floats."""
    values = torch.tensor(list(outliers.values()), dtype=torch.float64)
    densities = (values - values.min()) / (values.max() - values.min()) * reach * 2
    return 1 - (densities - densities.mean() + 1 - sparsity)


@given(
    st.lists(st.floats(0, 1), min_size=12, max_size=12, unique=True), st.integers(30, 80), st.sampled_from([0.08, 0.2])
)
def test_owl_is_as_published_where_layers_are_alike(values, percent, reach):
    outliers = {f"model.layers.{layer}": value for layer, value in enumerate(values)}
    sparsities = by_outliers(SIZES, Fraction(percent, 100), outliers, reach)
    expected = published_owl(outliers, percent / 100, reach)
    for layer in range(12):
        assert float(sparsities[f"model.layers.{layer}.mlp.up_proj"]) == pytest.approx(expected[layer].item(), abs=1e-9)
        assert len({sparsities[name] for name in SIZES if name.startswith(f"model.layers.{layer}.")}) == 1
    assert overall(SIZES, sparsities) == Fraction(percent, 100)


def test_owl_meets_the_sum_where_layers_are_not_alike_and_spares_outliers():
    sizes = {"h.0.mlp": 100, "h.1.mlp": 900}
    sparsities = by_outliers(sizes, Fraction("0.7"), {"h.0": 0.05, "h.1": 0.01}, 0.08)
    assert overall(sizes, sparsities) == Fraction("0.7")
    assert float(sparsities["h.1.mlp"] - sparsities["h.0.mlp"]) == pytest.approx(0.16)


def test_owl_is_uniform_where_no_layer_stands_out():
    assert by_outliers({"h.0.a": 5, "h.1.a": 7}, Fraction(1, 3), {"h.0": 0.1, "h.1": 0.1}, 0.08) == {
        "h.0.a": Fraction(1, 3),
        "h.1.a": Fraction(1, 3),
    }


def test_owl_cannot_go_beyond_1():
    told = r"^config key layer_sparsity.owl_lambda: h\.1: a sparsity of 1\.03, .* lower it from 0.08$"
    with pytest.raises(UserError, match=told):
        by_outliers({"h.0.a": 5, "h.1.a": 5}, Fraction("0.95"), {"h.0": 0.1, "h.1": 0.0}, 0.08)


def test_outliers_are_counted_over_the_whole_layer():
    generator = torch.Generator().manual_seed(0)
    matrices = [
        (f"h.{layer}.{name}", torch.randn(9, 7, generator=generator), torch.rand(7, generator=generator) * scale)
        for layer, name, scale in ((0, "a", 1), (0, "b", 100), (1, "a", 1))
    ]
    shares = outlier_shares(iter(matrices), times_mean=2)
    for layer in (0, 1):
        metric = torch.cat([(w.abs() * s.sqrt()).flatten() for name, w, s in matrices if name.startswith(f"h.{layer}")])
        assert shares[f"h.{layer}"] == (metric > 2 * metric.mean()).double().mean().item()
