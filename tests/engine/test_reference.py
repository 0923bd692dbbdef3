"""Every method on every family gives what the kept reference says: see :mod:`benchmarks.reference`."""

import json

import pytest

from benchmarks.reference import REFERENCE, difference, names, run

QUICK = ["llama", "phi3", "mixtral"]
"""Families that the default tests take: plain, fused, and a mixture of experts."""


def check(cases: list[str]) -> None:
    expected = json.loads(REFERENCE.read_text())
    found = {name: difference(expected[name], result) for name, result in run(cases)}
    assert not {name: how for name, how in found.items() if how}


def test_the_reference_has_every_case() -> None:
    assert json.loads(REFERENCE.read_text()).keys() == set(names())


@pytest.mark.parametrize("family", QUICK)
def test_methods_on_a_family(family: str) -> None:
    check([name for name in names() if name.startswith(f"{family}/") and name.endswith("/1")])


@pytest.mark.slow
def test_every_method_on_every_family() -> None:
    check(names())


def test_a_difference_is_told() -> None:
    expected = json.loads(REFERENCE.read_text())
    plain = expected["llama/wanda/1"]
    assert difference(plain, plain) is None
    assert difference(plain, {"error": "method_unsupported"}) == "error None became method_unsupported"
    other = {**plain, "norms": [2 * norm for norm in plain["norms"]]}
    assert "tensors differ" in str(difference(plain, other))
    fewer = {**plain, "plan": [{**layer, "kv_groups": layer["kv_groups"][1:]} for layer in plain["plan"]]}
    assert "kv_groups" in str(difference(plain, fewer))
    assert "layer 0 keeps other channels" in str(difference(plain, expected["llama/magnitude/1"])) or "keeps" in str(
        difference(plain, expected["llama/magnitude/1"])
    )
