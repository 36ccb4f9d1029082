"""Rules: every form in which a value speaks of layers is read, gathered by an order, and spelled again, or is not that form at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.rules import (
    CYCLE,
    INDICES,
    INDICES_FROM_1,
    KEYED,
    LETTERS,
    LIST,
    LIST_OF_PERIOD,
    NOT_PER_LAYER,
    PAIRS,
    PERIOD,
    PREFIX,
    RULES,
    RUNS,
    SUFFIX,
    SWITCH,
    WRITTEN,
    Rule,
    whole,
)

ORDERS = st.lists(st.integers(0, 5), min_size=1, max_size=9)


def follow(rule: Rule, value: Any, depth: int, order: list[int]) -> Any:
    """The value for a new stack."""
    entries = rule.decode(value, depth)
    assert entries is not None and len(entries) == depth
    return rule.encode([entries[index] for index in order], value)


@pytest.mark.parametrize(
    ("rule", "value", "order", "after"),
    [
        (LIST, ["a", "b", "c", "d"], [3, 0, 0], ["d", "a", "a"]),
        (LIST, [[1], [2], [3], [4]], [1, 2], [[2], [3]]),
        (INDICES, [1, 3], [3, 2, 1], [0, 2]),
        (INDICES, [], [0, 1], []),
        (INDICES, [0, 1, 2, 3], [0, 2], [0, 1]),
        (INDICES, [3], [0, 1], []),
        (INDICES_FROM_1, [1, 4], [3, 1, 0], [1, 3]),
        (INDICES_FROM_1, [4], [3, 3], [1, 2]),
        (PREFIX, 2, [0, 2, 3], 1),
        (PREFIX, 2, [2, 3], 0),
        (PREFIX, 0, [3, 1], 0),
        (PREFIX, 9, [0, 1], 2),
        (PREFIX, 2, [2, 0], None),
        (SUFFIX, 2, [0, 1, 3], 1),
        (SUFFIX, 2, [0, 1], 0),
        (SUFFIX, 2, [3, 0], None),
        (PERIOD, 2, [2, 3], 2),
        (PERIOD, 2, [0, 3], 2),
        (PERIOD, 2, [1, 2], None),
        (PERIOD, 1, [3, 0], 1),
        (PERIOD, 9, [0, 1], 9),
        (PERIOD, 9, [0, 2], None),
        (KEYED, {"1": "x", "3": "y"}, [1, 2, 3], {"0": "x", "2": "y"}),
        (KEYED, {"01": {"a": 1}, "03": {"a": 2}}, [3, 3], {"00": {"a": 2}, "01": {"a": 2}}),
        (KEYED, {}, [0], {}),
        (LETTERS, "M-E*", [3, 0, 0], "*MM"),
        (KEYED, {"0": None, "2": 5}, [0, 2], {"1": 5}),  # null is the same as no entry
        (WRITTEN, "1,3", [3, 2, 1], "0,2"),
        (WRITTEN, " 1 ,  3 ", [0, 1], "1"),
        (WRITTEN, "", [0, 1], ""),
        (CYCLE, ["a", "b"], [2, 3], ["a", "b"]),
        (CYCLE, ["a", "b"], [1, 2, 3], ["b", "a"]),
        (CYCLE, ["a", "b"], [0, 2], ["a", "a"]),  # the old length still fits
        (CYCLE, ["a", "b"], [0, 2, 0, 3], ["a", "a", "a", "b"]),
        (CYCLE, ["a", "b", "b"], [0, 1, 3, 1], ["a", "b"]),
        (CYCLE, ["a", "a", "b"], [0, 2, 3], ["a", "b", "a"]),
        (CYCLE, "LG", [1, 2, 3, 0], "GL"),
        (CYCLE, "LG", [0, 1, 0, 1, 0, 1], "LG"),
        (RUNS, [[["a", "b"], 2]], [2, 3], [[["a", "b"], 1]]),
        (RUNS, [[["a", "b"], 2]], [0, 1, 0, 1, 0, 1], [[["a", "b"], 3]]),
        (RUNS, [[["a", "b"], 2]], [1, 2, 3], [[["b"], 1], [["a"], 1], [["b"], 1]]),
        (RUNS, [[["a"], 2], [["b"], 2]], [1, 2], [[["a"], 1], [["b"], 1]]),
    ],
)
def test_values_follow_an_order(rule: Rule, value: Any, order: list[int], after: Any) -> None:
    assert follow(rule, value, 4, order) == after


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        (LIST, ["a", "b", "c"]),
        (LIST, "abcd"),
        (LIST, list("abcde")),
        (LETTERS, "abcde"),
        (LIST, 4),
        (LIST, None),
        (INDICES, [0, 4]),
        (INDICES, [-1]),
        (INDICES, ["0"]),
        (INDICES, 2),
        (INDICES_FROM_1, [0]),
        (INDICES_FROM_1, [5]),
        (PREFIX, None),
        (PREFIX, "2"),
        (SUFFIX, [2]),
        (PERIOD, 0),
        (PERIOD, -1),
        (PERIOD, [2]),
        (KEYED, {"4": 1}),
        (KEYED, {"x": 1}),
        (KEYED, {"²": 1}),
        (KEYED, {"9" * 5000: 1}),
        (KEYED, [1]),
        (LETTERS, "abc"),
        (LETTERS, ["a", "b", "c", "d"]),
        (INDICES, [True]),
        (INDICES, [1.0]),
        (INDICES, [0, None]),
        (PREFIX, True),
        (SUFFIX, 1.0),
        (PERIOD, True),
        (KEYED, {"-1": 1}),
        (WRITTEN, "1,4"),
        (WRITTEN, "1 3"),
        (WRITTEN, "1,,3"),
        (WRITTEN, "1,"),
        (WRITTEN, "-1"),
        (WRITTEN, "9" * 7),
        (WRITTEN, "²"),
        (WRITTEN, [1, 3]),
        (CYCLE, []),
        (CYCLE, ""),
        (CYCLE, list("abcde")),
        (CYCLE, 3),
        (RUNS, [[["a"], 3]]),
        (RUNS, [[["a"], 5]]),
        (RUNS, [["a", 4]]),
        (RUNS, [[["a"], 4, 1]]),
        (RUNS, [[["a"], True]]),
        (RUNS, [[["a"], -4]]),
        (RUNS, [[["a"] * 4, 10**30]]),
        (RUNS, []),
        (RUNS, "abcd"),
    ],
)
def test_values_that_a_rule_does_not_read(rule: Rule, value: Any) -> None:
    assert rule.decode(value, 4) is None


VALUES = {
    LIST: st.lists(st.sampled_from("abc"), min_size=6, max_size=6),
    INDICES: st.lists(st.integers(0, 5), unique=True).map(sorted),
    INDICES_FROM_1: st.lists(st.integers(1, 6), unique=True).map(sorted),
    PREFIX: st.integers(0, 6),
    SUFFIX: st.integers(0, 6),
    PERIOD: st.integers(1, 7),
    KEYED: st.dictionaries(st.integers(0, 5).map(str), st.integers(), max_size=6),
    LETTERS: st.text("ME*-", min_size=6, max_size=6),
    PAIRS: st.lists(st.sampled_from("abc"), min_size=6, max_size=6).map(lambda kinds: [part for kind in kinds for part in (kind, "mlp")]),
    WRITTEN: st.lists(st.integers(0, 5), unique=True).map(lambda found: ",".join(map(str, sorted(found)))),
    CYCLE: st.one_of(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.text("LG", min_size=1, max_size=6)),
    RUNS: st.sampled_from(
        [[[["a", "b"], 3]], [[["a", "b", "c"], 2]], [[["a"], 1], [["b"], 1], [["a"], 1], [["b"], 1], [["b"], 1], [["c"], 1]]]
    ),
}


@pytest.mark.parametrize("rule", list(VALUES), ids=lambda rule: rule.reason)
@given(data=st.data())
def test_rules_keep_what_they_say_of_each_layer(rule: Rule, data: st.DataObject) -> None:
    """What is encoded for a new stack reads back as the entries of its layers; the old stack reads back as it was."""
    value = data.draw(VALUES[rule])
    entries = rule.decode(value, 6)
    assert entries is not None
    assert rule.encode(entries, value) == value
    order = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))
    picked = [entries[index] for index in order]
    after = rule.encode(picked, value)
    if after is not None:
        again = rule.decode(after, len(order))
        assert again is not None and list(again) == picked


def test_every_rule_is_used_and_every_key_has_one() -> None:
    assert {rule for rules in RULES.values() for rule in rules} == set(VALUES)
    assert all(RULES.values())


# Against what the words mean, written without the rules


@given(st.lists(st.integers(), min_size=6, max_size=6), ORDERS)
def test_a_list_is_indexed(values: list[int], order: list[int]) -> None:
    assert follow(LIST, values, 6, order) == [values[index] for index in order]
    assert follow(LETTERS, "".join(chr(97 + value % 26) for value in values), 6, order) == "".join(chr(97 + values[i] % 26) for i in order)


@given(st.sets(st.integers(0, 5)), ORDERS)
def test_lists_of_layers_name_the_same_layers(listed: set[int], order: list[int]) -> None:
    """From 0, from 1, and written in a text: positions whose layer is listed."""
    positions = [at for at, index in enumerate(order) if index in listed]
    assert follow(INDICES, sorted(listed), 6, order) == positions
    assert follow(INDICES_FROM_1, [index + 1 for index in sorted(listed)], 6, order) == [at + 1 for at in positions]
    assert follow(WRITTEN, ",".join(map(str, sorted(listed))), 6, order) == ",".join(map(str, positions))
    assert follow(KEYED, {str(index): index for index in listed}, 6, order) == {str(at): order[at] for at in positions}


@given(st.integers(0, 6), st.sets(st.integers(0, 5), min_size=1))
def test_counts_lose_the_layers_that_go(count: int, kept: set[int]) -> None:
    """A cut keeps the order, so what comes first still comes first, and what comes last still comes last."""
    order = sorted(kept)
    assert follow(PREFIX, count, 6, order) == sum(index < count for index in order)
    assert follow(SUFFIX, count, 6, order) == sum(index >= 6 - count for index in order)


@given(st.integers(1, 8), ORDERS)
def test_a_period_stays_where_every_layer_keeps_its_phase(period: int, order: list[int]) -> None:
    kept = all(index % period == at % period for at, index in enumerate(order))
    assert follow(PERIOD, period, 6, order) == (period if kept else None)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=6), ORDERS)
def test_a_cycle_is_never_longer_than_it_must_be(cycle: list[str], order: list[int]) -> None:
    entries = [cycle[index % len(cycle)] for index in order]
    after = follow(CYCLE, cycle, 6, order)
    assert [after[at % len(after)] for at in range(len(order))] == entries
    shorter = [n for n in range(1, len(after)) if all(entries[at] == entries[at % n] for at in range(len(entries)))]
    assert not shorter or len(after) == min(len(cycle), len(order)), "only the old length is kept where a shorter one would do"
    assert follow(CYCLE, "".join(cycle), 6, order) == "".join(after)


@given(st.integers(1, 3), st.integers(0, 120))
def test_keys_keep_their_width(width: int, depth: int) -> None:
    value = {str(index).zfill(width): index for index in range(depth)}
    padded = width > 1 and depth > 0
    assert follow(KEYED, value, depth, list(range(depth))) == {
        str(i).zfill(max(len(k) for k in value) if padded else 1): i for i in range(depth)
    }


@pytest.mark.parametrize(("value", "counts"), [(0, True), (-3, True), (True, False), (1.0, False), ("1", False), (None, False)])
def test_what_counts_layers(value: Any, counts: bool) -> None:
    assert whole(value) is counts


# Which key follows which rule


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("layer_types", list("abcdef"), LIST),
        ("layer_types", "abcdef", None),
        ("moe_layer_freq", [0, 1, 1, 1, 1, 1], LIST),
        ("moe_layer_freq", 1, PERIOD),
        ("moe_layers_enum", "3,4,5", WRITTEN),
        ("moe_layers_enum", [3, 4, 5], INDICES),
        ("full_attn_layers", [6], INDICES_FROM_1),
        ("mlp_only_layers", [5], INDICES),
        ("first_k_dense_replace", 2, PREFIX),
        ("num_kv_shared_layers", 2, SUFFIX),
        ("sliding_window_pattern", 6, PERIOD),
        ("sliding_window_pattern", "LLLG", CYCLE),
        ("hybrid_override_pattern", "MEMEM*", LETTERS),
        ("index_topk_pattern", [1, 0, 0, 1, 0, 0], LIST),
        ("per_layer_config", {"05": {}}, KEYED),
        ("block_types", ["recurrent", "recurrent", "attention"], CYCLE),
        ("attention_types", [[["global", "local"], 3]], RUNS),
    ],
)
def test_the_first_rule_that_reads_a_value_is_its_rule(key: str, value: Any, rule: Rule | None) -> None:
    assert next((rule for rule in RULES[key] if rule.decode(value, 6) is not None), None) is rule


def test_the_tables_of_keys_fit_together() -> None:
    assert not set(RULES) & set(NOT_PER_LAYER)
    assert {key for pair in LIST_OF_PERIOD.items() for key in pair} <= set(RULES)
    assert all(LIST in RULES[key] or INDICES in RULES[key] for key in LIST_OF_PERIOD.values())
    assert all({PERIOD, PREFIX} & set(RULES[key]) for key in LIST_OF_PERIOD)
    assert set(SWITCH) <= set(RULES) and not set(SWITCH.values()) & set(RULES)
