"""The checks of arguments that every door shares: a wrong type is a TypeError, a wrong value a ValueError."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import Labelled

from fastvae import Clicks
from fastvae._checks import (
    check_catalogue,
    check_choice,
    check_flag,
    check_ids,
    check_integer,
    check_number,
    shown,
)

CLICKS = Clicks([0, 1], [1], n_items=3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_integer("f", "k", 1.0), TypeError, "f: k must be a whole number, got 1.0"),
        (lambda: check_integer("f", "k", True), TypeError, "f: k must be a whole number, got True"),
        (lambda: check_integer("f", "k", None), TypeError, "f: k must be a whole number, got None"),
        (lambda: check_integer("f", "k", torch.tensor(3)), TypeError, "f: k must be a whole number, got tensor(3)"),
        (lambda: check_integer("f", "k", 0, 1), ValueError, "f: k must be at least 1, got 0"),
        (lambda: check_integer("f", "k", 2**31), ValueError, "f: k must lie below 2**31, got 2147483648"),
        (lambda: check_integer("f", "k", 7, 0, 7), ValueError, "f: k must lie below 7, got 7"),
        (lambda: check_integer("f", "k", 10**5000), ValueError,
         "f: k must lie below 2**31, got a whole number of more than 40 digits"),
        (lambda: check_number("f", "p", "1"), TypeError, "f: p must be a number, got '1'"),
        (lambda: check_number("f", "p", 1j), TypeError, "f: p must be a number, got 1j"),
        (lambda: check_number("f", "p", math.nan), ValueError, "f: p must be a finite number, got nan"),
        (lambda: check_number("f", "p", 10**400), ValueError,
         "f: p must be a finite number, got a whole number of more than 40 digits"),
        (lambda: check_number("f", "p", -1, 0), ValueError, "f: p must be a finite number of at least 0, got -1"),
        (lambda: check_number("f", "p", 0, 0, above=True), ValueError, "f: p must be a finite number above 0, got 0"),
        (lambda: check_number("f", "p", 1.0, 0, 1), ValueError, "f: p must lie in [0, 1), got 1.0"),
        (lambda: check_number("f", "p", 0.0, 0, 1, above=True), ValueError, "f: p must lie in (0, 1), got 0.0"),
        (lambda: check_choice("f", "how", "c", ("a", "b")), ValueError, "f: how must be one of a, b, got 'c'"),
        (lambda: check_choice("f", "how", None, ("a", "b")), TypeError, "f: how must be one of a, b, got None"),
        (lambda: check_choice("f", "how", "x" * 99, ("a",)), ValueError,
         f"f: how must be one of a, got '{'x' * 76}..."),
        (lambda: check_flag("f", "on", "no"), TypeError, "f: on must be True or False, got 'no'"),
        (lambda: check_flag("f", "on", 1), TypeError, "f: on must be True or False, got 1"),
        (lambda: check_catalogue("f", "x", torch.ones(1, 3), 3), TypeError,
         "f: x must be Clicks, got Tensor; pass Clicks.from_matrix(x)"),
        (lambda: check_catalogue("f", "x", CLICKS, 4), ValueError, "f: x must have the model's 4 items, got 3"),
    ],
)  # fmt: skip
def test_a_wrong_type_and_a_wrong_value_are_named(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert (type(caught.value), str(caught.value)) == (error, message)


def test_what_fits_comes_back_as_pythons_own():
    for given, found in (
        (np.int32(4), check_integer("f", "k", np.int32(4), 4, 5)),
        (2.5, check_number("f", "p", np.float32(2.5))),
        (0.25, check_number("f", "p", Fraction(1, 4), 0.25)),
        (True, check_flag("f", "on", np.True_)),
        ("b", check_choice("f", "how", "b", ("a", "b"))),
    ):
        assert found == given and type(found) in (int, float, bool, str)
    check_catalogue("f", "x", CLICKS, 3)


def test_a_value_is_shown_as_its_user_wrote_it():
    assert [shown(value) for value in (np.float32(2), 0.0, "a", None)] == ["2.0", "0.0", "'a'", "None"]  # fmt: skip


IDS = ["b", "a", "10"]


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=object),
        np.array(["10", "a", "b"])[::-1],
        Labelled(IDS),
        dict.fromkeys(IDS).keys(),
        iter(IDS),
        ["b", "a", 10],
    ],
    ids=["list", "tuple", "str", "object", "reversed", "labelled", "keys", "iterator", "int"],
)
def test_ids_by_position(ids):
    assert [str(item) for item in check_ids("f", "items", ids, 3)] == IDS


@pytest.mark.parametrize("ids", [np.array([7, 8]), torch.tensor([7, 8]), range(7, 9)])
def test_numbers_of_arrays_become_plain_ids(ids):
    found = check_ids("f", "items", ids, 2)
    assert found == [7, 8] and {type(item) for item in found} == {int}


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ({"a": 0, "b": 1}, TypeError, "must be ids in their order, got dict; pass a list"),
        ({"a", "b"}, TypeError, "must be ids in their order, got set; pass a list"),
        (frozenset("ab"), TypeError, "must be ids in their order, got frozenset; pass a list"),
        ("ab", TypeError, "must be ids in their order, got str; pass a list"),
        (b"ab", TypeError, "must be ids in their order, got bytes; pass a list"),
        (3, TypeError, "must be ids in their order, got int; pass a list"),
        (np.array([["a", "b"]]), TypeError, "must be ids in their order, got ndarray; pass a list"),
        (["a", 1.0], TypeError, "must hold ids that are str or int, got float at position 1"),
        (np.array([1.0, 2.0]), TypeError, "must hold ids that are str or int, got float at position 0"),
        (["a", None], TypeError, "must hold ids that are str or int, got NoneType at position 1"),
        ([True, False], TypeError, "must hold ids that are str or int, got bool at position 0"),
        ([b"a", b"b"], TypeError, "must hold ids that are str or int, got bytes at position 0"),
        ({"a": 0, "b": 1}.items(), TypeError, "must be ids in their order, got dict_items; pass a list"),
        (["a", " "], ValueError, "must hold ids that are not empty, got ' ' at position 1"),
        (["a"], ValueError, "must hold 2 ids, got 1"),
        (["a", "a"], ValueError, "must be distinct, got 'a' twice"),
        ([10, "10"], ValueError, "must be distinct, got '10' twice"),
    ],
)  # fmt: skip
def test_what_has_no_order_or_no_ids_is_refused(ids, error, message):
    with pytest.raises(error) as caught:
        check_ids("f", "items", ids, 2)
    assert str(caught.value) == f"f: items {message}"


def test_users_may_come_twice():
    assert check_ids("f", "user_ids", ["a", "a"], distinct=False) == ["a", "a"]
