"""The concentration bound of DAREx Theorem 3.1: its constant, and that it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import darex_jax as dx
from darex_jax.core.bound import phi


@pytest.mark.parametrize(
    "p", [1e-12, 1e-7, 0.001, 0.1, 0.3, 0.4949, 0.4951, 0.499999, 0.5, 0.5049, 0.7, 0.99, 0.999, 1 - 2**-24]
)
def test_phi(p):
    p = float(np.float32(p))
    exact = 0.5 if p == 0.5 else (1 - 2 * p) / np.log((1 - p) / p)
    assert float(phi(p)) == pytest.approx(exact, rel=1e-6)
    assert np.isfinite(jax.grad(phi)(p))


def test_phi_is_0_without_and_with_all_of_the_dropping():
    assert float(phi(0.0)) == float(phi(1.0)) == 0.0


@pytest.mark.parametrize("drop_rate", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("ratio", [1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.05, 0.5])
def test_violations_stay_under_gamma(drop_rate, ratio, gamma):
    outputs, inputs, draws = 8, 512, 200
    c = jax.random.normal(jax.random.key(0), (outputs, inputs)) + 0.1
    q = ratio * (1 - drop_rate)
    bound = dx.output_error_bound(c, drop_rate, q, gamma)

    @jax.jit
    def error(key):
        mask = jax.random.bernoulli(key, 1 - drop_rate, c.shape)
        return jnp.abs(jnp.sum(c * (1 - mask / q), axis=-1))

    errors = jax.lax.map(error, jax.random.split(jax.random.key(1), draws))
    violations = float(jnp.mean(errors > bound[None]))
    assert violations <= gamma + 5 * np.sqrt(gamma * (1 - gamma) / (outputs * draws))
    assert float(jnp.max(bound)) < 20 * float(jnp.std(errors))  # not trivially loose


def test_without_influence_the_bound_and_its_gradients_are_zero():
    """A row of the delta can be zero, and the drop rate can be 0."""
    c = jnp.array([[0.0, 0.0], [1.0, -2.0]])
    bound, gradients = jax.value_and_grad(
        lambda *args: dx.output_error_bound(*args, 0.05)[0], argnums=(0, 1, 2)
    )(c, 0.9, 0.3)
    assert bound == 0 and all((g == 0).all() for g in gradients)
    for drop_rate in (0.0, 0.9):
        slopes = jax.grad(lambda c, p=drop_rate: dx.output_error_bound(c, p, 1 - p, 0.05).sum())(c)
        assert np.isfinite(slopes).all()
    assert dx.output_error_bound(c, 0.0, 1.0, 0.05).tolist() == [0, 0]


def test_mean_and_variance_of_the_error():
    c = np.asarray(jax.random.normal(jax.random.key(0), (256,)) + 0.2, np.float64)
    p, q, draws = 0.9, 0.25, 40_000
    mask = np.random.default_rng(0).random((draws, 256)) < 1 - p
    h = (c * (1 - mask / q)).sum(axis=1)
    variance = p * (1 - p) / q**2 * (c**2).sum()
    assert abs(h.mean() - (1 - (1 - p) / q) * c.sum()) < 5 * np.sqrt(variance / draws)
    assert h.var() == pytest.approx(variance, rel=0.05)
