"""The closed form over layers: one without output leaves the others and the model finite."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.q.closed_form import closed_form
from darex_jax.q.per_layer import spread_q

LIVE = (np.array([2.0, 4.0]), np.array([1.0, 2.0]))  # E[Q] and E[S^2] of two rows
DEAD = (np.array([3.0, 5.0]), np.zeros(2))  # influences that cancel out
ZERO = (np.zeros(2), np.zeros(2))  # no delta


def test_a_layer_without_output_makes_no_other_q_infinite():
    form = closed_form({"a.weight": LIVE, "b.weight": DEAD, "c.weight": ZERO}, 0.9)
    assert form.layers == {"a.weight": pytest.approx(0.1 + 0.9 * 6 / 3), "c.weight": pytest.approx(0.1)}
    assert form.q == pytest.approx(0.1 + 0.9 * 14 / 3)
    assert np.isinf(form.rows["b.weight"]).all() and np.isfinite(form.rows["a.weight"]).all()
    q = spread_q(form.layers, ["a.weight", "b.weight", "b.bias", "norm.weight"])
    assert all(math.isfinite(value) for value in q.values()) and q["b.bias"] == q["b.weight"]
    json.dumps([form.q, form.layers, q], allow_nan=False)


def test_a_quotient_beyond_float64_is_no_number_either():
    form = closed_form({"a": LIVE, "b": (np.array([1e300]), np.array([1e-300]))}, 0.9)
    assert list(form.layers) == ["a"] and math.isfinite(form.q)


def test_no_layer_with_output_is_an_error():
    with pytest.raises(ValueError, match="no layer's delta changes an output on these texts"):
        closed_form({"b": DEAD, "c": ZERO}, 0.9)
    assert closed_form({"c": ZERO}, 0.9).q == pytest.approx(0.1)
    assert closed_form({"b": DEAD}, 0.0).q == 1.0  # nothing is dropped
    assert dx.closed_form_q([], [], 0.5).shape == (0,)


def test_q_of_rows_is_also_computed_within_a_program():
    energies, squares = jnp.array([2.0, 4.0, 0.0]), jnp.array([1.0, 8.0, 0.0])
    for find in (
        lambda e, s: dx.closed_form_q(e, s, 0.9),
        lambda e, s: dx.analytic_q(-s, e, 0.9, 0.4),
    ):
        expected = find(energies, squares)
        assert isinstance(expected, np.ndarray) and expected.dtype == np.float64
        np.testing.assert_allclose(jax.jit(find)(energies, squares), expected, rtol=1e-5)
        np.testing.assert_allclose(jax.vmap(find)(energies, squares), expected, rtol=1e-5)
        for i, traced in enumerate((energies, squares)):  # only one traced, the other a number
            known = [np.asarray(energies), np.asarray(squares)]
            half = jax.jit(lambda x, i=i, known=known, find=find: find(*known[:i], x, *known[i + 1 :]))
            np.testing.assert_allclose(half(traced), expected, rtol=1e-5)
        slope = jax.grad(lambda e, find=find: find(e, squares).sum())(energies)
        assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match="'published' runs on the host"):
        jax.jit(lambda s: dx.analytic_q(s, s, 0.9, 0.4, rule="published"))(squares)
