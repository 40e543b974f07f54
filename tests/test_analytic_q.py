"""q from sums over a layer's inputs: Algorithm 3's two rules, and the closed form of the squared error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import darex_jax as dx
from darex_jax.core.bound import phi


def residual(q, s, energy, drop_rate, eta, prob=0.95):
    spread = eta**2 * float(phi(drop_rate)) * energy / (4 * q**2)
    return np.abs(eta * (1 - (1 - drop_rate) / q) * s + spread + math.log(2 / (1 - prob)))


sums = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6)
rates = st.sampled_from([0.5, 0.9, 0.99, 0.999])


@settings(deadline=None, max_examples=200)
@given(sums, st.floats(0, 3), rates, st.floats(0.01, 2), st.integers(1, 4000))
def test_the_exact_rule_is_no_worse_than_a_fine_scan(s, log_share, drop_rate, eta, inputs):
    s = np.array(s)
    energy = s**2 / inputs * 10**log_share  # S^2 <= n Q
    q = dx.analytic_q(s, energy, drop_rate, eta)
    assert ((q >= 1 - drop_rate - 1e-12) & (q <= 1)).all()
    scan = residual(1 / np.linspace(1, 1 / (1 - drop_rate), 2001)[:, None], s, energy, drop_rate, eta)
    found = residual(q, s, energy, drop_rate, eta)
    assert (
        found <= scan.min(0) + 1e-9 * (1 + np.abs(eta * s) + eta**2 * energy / (1 - drop_rate) ** 2)
    ).all()


def test_the_four_kinds_of_rows():
    """No influence; a root; no real root but the vertex inside; the end."""
    p, eta = 0.99, 1.0
    weight, bound = float(phi(p)) / 4, math.log(40)
    u = 20.0  # expected
    s_root = -(bound + weight * 1e-3 * u**2) / (1 - 0.01 * u)
    s_vertex = 2 * weight * 5.0 * u / 0.01
    q = dx.analytic_q([0.0, s_root, s_vertex, 5.0], [0.0, 1e-3, 5.0, 50.0], p, eta)
    assert q[0] == pytest.approx(0.01)
    assert residual(q[1], s_root, 1e-3, p, eta) == pytest.approx(0, abs=1e-9)
    linear, constant = -0.01 * s_vertex, s_vertex + bound
    assert linear**2 - 4 * weight * 5.0 * constant < 0 and q[2] == pytest.approx(1 / u)
    assert q[3] == 1.0


def published(c, drop_rate, eta, prob=0.95, share=0.8):
    """The authors' scan on a float16 matrix of influences [rows, inputs], in PyTorch."""
    torch = pytest.importorskip("torch")
    c = torch.tensor(c).half()
    chosen = torch.full((len(c),), 1 - drop_rate, dtype=torch.float64)
    least = torch.full((len(c),), 1e4, dtype=torch.float16)
    seen = torch.zeros(len(c), dtype=torch.bool)
    phi64 = (1 - 2 * drop_rate) / math.log((1 - drop_rate) / drop_rate)
    for k in range(int((1 - drop_rate) * 1000), 999):
        q = k * 0.001
        bias = (1 - (1 - drop_rate) / q) * c.sum(1)
        value = (eta * bias + (eta**2 * phi64 * (c**2).sum(1) / (4 * q**2) + math.log(2 / (1 - prob)))).abs()
        seen |= value >= least
        chosen[value <= least] = q
        least = torch.minimum(least, value)
        if seen.double().mean() >= share:
            break
    return chosen.numpy(), c.sum(1).float().numpy(), (c**2).sum(1).float().numpy()


@pytest.mark.parametrize("eta", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("drop_rate", [0.9, 0.99, 0.999])
@pytest.mark.parametrize(("rows", "inputs", "scale"), [(50, 64, 0.1), (40, 768, 0.01), (20, 30, 1.0)])
def test_the_published_rule_is_the_authors_scan(rows, inputs, scale, drop_rate, eta):
    c = scale * np.random.default_rng(0).standard_normal((rows, inputs), dtype=np.float32)
    expected, s, energy = published(c, drop_rate, eta)
    q = dx.analytic_q(s, energy, drop_rate, eta, rule="published")
    np.testing.assert_allclose(q, expected, atol=1e-9)
    assert q.mean() < dx.analytic_q(s, energy, drop_rate, eta).mean()  # it stopped before the minimum


def test_the_published_rule_above_its_own_step():
    """The authors' scan would start at q = 0 and divide by it."""
    q = dx.analytic_q([-1.0, 2.0, 0.0], [1.0, 3.0, 0.0], 0.9995, 0.4, rule="published")
    assert ((q > 0) & (q <= 1)).all()


def test_the_closed_form_minimises_the_expected_error():
    """Against the mean over many masks, for one layer and many inputs."""
    drop_rate, keys = 0.8, jax.random.split(jax.random.key(0), 3)
    delta = jax.random.normal(keys[0], (6, 16)) + 0.5
    x = jax.random.normal(keys[1], (50, 16)) + 0.5
    squares = jnp.mean((x @ delta.T) ** 2, axis=0)
    energies = jnp.mean(x**2, axis=0) @ (delta**2).T
    by_row = dx.closed_form_q(energies, squares, drop_rate)
    layer = float(dx.closed_form_q(energies.sum(), squares.sum(), drop_rate))
    assert by_row.shape == (6,) and 0.2 < layer < 1

    masks = jax.random.bernoulli(keys[2], 1 - drop_rate, (4000, *delta.shape))

    def error(q):
        """Mean squared error of each row, over masks and inputs."""
        one = lambda m: jnp.mean((x @ (delta - m * delta / q).T) ** 2, axis=0)  # noqa: E731
        return np.asarray(jnp.mean(jax.lax.map(one, masks), axis=0))

    for factor in (0.8, 1.25):
        assert error(layer).sum() < error(factor * layer).sum()
    theory = (1 - 0.2 / layer) ** 2 * squares + drop_rate * 0.2 / layer**2 * energies
    np.testing.assert_allclose(error(layer), theory, rtol=0.1)


def test_the_closed_form_at_its_edges():
    assert dx.closed_form_q(3.0, 3.0, 0.0) == 1.0  # nothing dropped, nothing to rescale
    np.testing.assert_allclose(dx.closed_form_q([0.0, 2.0, 2.0], [0.0, 0.0, 1.0], 0.9), [0.1, np.inf, 1.9])


def test_wrong_arguments_are_explained():
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        dx.analytic_q([1, 2], [1, 2, 3], 0.9, 0.4)
    needed = r"need 0 < drop_rate < 1, 0 <= prob < 1 and a finite eta > 0, got "
    for wrong in ((1.0, 0.4), (0.0, 0.4), (-0.5, 0.4), (0.9, 0.0), (0.9, -0.4), (0.9, math.inf)):
        with pytest.raises(ValueError, match=needed):
            dx.analytic_q([1], [1], *wrong)
    for prob in (-0.1, 1.0):
        with pytest.raises(ValueError, match=needed):
            dx.analytic_q([1], [1], 0.9, 0.4, prob)
    with pytest.raises(ValueError, match="energies finite and non-negative"):
        dx.analytic_q([1], [-1], 0.9, 0.4)
    with pytest.raises(ValueError, match="rule is 'exact' or 'published', got 'scan'"):
        dx.analytic_q([1], [1], 0.9, 0.4, rule="scan")
    with pytest.raises(ValueError, match=r"drop_rate is a probability in \[0, 1\), got 1\.0"):
        dx.closed_form_q([1], [1], 1.0)
    with pytest.raises(ValueError, match="must be finite and non-negative"):
        dx.closed_form_q([math.inf], [1], 0.5)
