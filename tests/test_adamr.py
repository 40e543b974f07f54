"""AdamR: against Algorithm 1 in NumPy float64, against Adam, and optax's conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import darex_jax as dx
from darex_jax.training.loop import delta_size

SHAPES = {"body": {"weight": (12, 7), "bias": (7,)}, "frozen": {"weight": (5,)}, "head": {"weight": (3, 7)}}
is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}


def random_tree(seed, scale=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.standard_normal(s), jnp.float32), shapes, **is_shape
    )


def without_head(tree):
    return {name: leaf for name, leaf in tree.items() if name != "head"}


def gradients(params, step):
    """Gradients that depend on the parameters, so that errors grow; zero for the frozen leaf."""
    grads = jax.tree.map(lambda p, n: 0.1 * p + n, params, random_tree(100 + step, 0.05))
    return grads | {"frozen": jax.tree.map(jnp.zeros_like, grads["frozen"])}


def algorithm_1(
    params, pretrained, grads, rates, *, decay, norm, amsgrad, pulled, b1=0.9, b2=0.999, eps=1e-8
):
    """Algorithm 1 of DAREx, line by line, in float64. `grads` is a function of (params, step)."""
    as64 = lambda tree: {k: np.asarray(v, np.float64) for k, v in tree.items()}  # noqa: E731
    theta, theta_p = as64(params), as64(pretrained)
    m, v, top = ({k: np.zeros_like(x) for k, x in theta.items()} for _ in range(3))
    for t, rate in enumerate(rates, start=1):
        g = as64(grads(theta, t - 1))
        for k in theta:
            m[k] = b1 * m[k] + (1 - b1) * g[k]
            v[k] = b2 * v[k] + (1 - b2) * g[k] ** 2
            top[k] = np.maximum(top[k], v[k])
        v_hat = {k: x / (1 - b2**t) for k, x in (top if amsgrad else v).items()}
        s = np.sqrt(np.concatenate([x.ravel() for x in v_hat.values()]).mean()) or 1.0
        for k in theta:
            if k in pulled:
                delta = theta[k] - theta_p[k]
                theta[k] = theta[k] - rate * decay / s * (delta if norm == "l2" else np.sign(delta))
            theta[k] = theta[k] - rate / (1 - b1**t) * m[k] / (np.sqrt(v_hat[k]) + eps)
    return theta


def flat(tree):
    return {"/".join(str(p.key) for p in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_200_steps_are_algorithm_1(norm, amsgrad):
    """With a schedule, a leaf that has no gradient and is not pulled, and a head without a reference."""
    schedule = optax.linear_schedule(1e-2, 1e-3, 200)
    mask = {"body": True, "frozen": False, "head": True}
    transform = dx.adamr(schedule, weight_decay=2e-3, norm=norm, amsgrad=amsgrad, mask=mask)
    start, pretrained = random_tree(0), random_tree(1)
    params, state = start, transform.init(start)

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params, pretrained=without_head(pretrained))
        return optax.apply_updates(params, updates), state

    for t in range(200):
        params, state = step(params, state, gradients(params, t))
    assert step._cache_size() == 1

    def grads(theta, t):
        noise = flat(random_tree(100 + t, 0.05))
        return {
            k: np.zeros_like(x) if k.startswith("frozen") else 0.1 * x + np.asarray(noise[k], np.float64)
            for k, x in theta.items()
        }

    expected = algorithm_1(
        flat(start),
        flat(pretrained),
        grads,
        [float(schedule(t)) for t in range(200)],
        decay=2e-3,
        norm=norm,
        amsgrad=amsgrad,
        pulled={"body/weight", "body/bias"},
    )
    # Under l1 the sign of a tiny delta depends on rounding: the error can be one step's pull.
    atol = 1e-3 if norm == "l1" else 2e-5
    for name, leaf in flat(params).items():
        np.testing.assert_allclose(leaf, expected[name], atol=atol, err_msg=name)
        assert np.mean(np.abs(leaf - expected[name])) < 2e-5, name
    np.testing.assert_array_equal(params["frozen"]["weight"], start["frozen"]["weight"])
    unpulled = dx.adamr(schedule, weight_decay=0.0, amsgrad=amsgrad)
    other, state = start, unpulled.init(start)
    for t in range(200):
        updates, state = unpulled.update(gradients(other, t), state)
        other = optax.apply_updates(other, updates)
    distance = lambda tree: float(optax.tree.norm(optax.tree.sub(tree["body"], pretrained["body"])))  # noqa: E731
    assert distance(params) < distance(other) - 0.1  # it did pull


def test_without_decay_it_is_adam_to_the_bit():
    ours, adam = dx.adamr(3e-3, weight_decay=0.0), optax.adam(3e-3)
    p1 = p2 = random_tree(0)
    s1, s2 = ours.init(p1), adam.init(p2)

    @jax.jit
    def step(p1, s1, p2, s2, grads):
        u1, s1 = ours.update(grads, s1, p1, pretrained=p1)
        u2, s2 = adam.update(grads, s2, p2)
        return optax.apply_updates(p1, u1), s1, optax.apply_updates(p2, u2), s2

    for t in range(20):
        p1, s1, p2, s2 = step(p1, s1, p2, s2, gradients(p1, t))
    jax.tree.map(np.testing.assert_array_equal, p1, p2)


def test_one_step_written_out():
    transform = dx.adamr(0.1, weight_decay=0.5)
    params, pretrained = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 4.0])}
    updates, state = transform.update(
        {"w": jnp.array([3.0, -4.0])}, transform.init(params), params, pretrained=pretrained
    )
    s = np.sqrt((9 + 16) / 2)
    expected = [-0.1 * (1 + 0.5 / s * 1.0), -0.1 * (-1 + 0.5 / s * -2.0)]
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4)
    assert float(state[0].nu_mean) == pytest.approx(1e-3 * 25 / 2, rel=1e-5)


def test_the_carried_mean_is_the_mean_of_the_second_moment():
    transform = dx.adamr(1e-3, weight_decay=1e-3)
    params = pretrained = random_tree(0)
    state = transform.init(params)
    for t in range(50):
        _, state = transform.update(random_tree(t, 10.0 ** (t % 3)), state, params, pretrained=pretrained)
    entries = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state[0].nu)]).astype(np.float64)
    assert float(state[0].nu_mean) == pytest.approx(entries.mean(), rel=1e-5)


def test_a_known_norm_gives_the_same_step():
    transform = dx.adamr(1e-3, weight_decay=1e-2)
    params, pretrained, grads = (random_tree(i) for i in range(3))
    state = transform.init(params)
    plain, _ = transform.update(grads, state, params, pretrained=pretrained)
    known, _ = transform.update(
        grads, state, params, pretrained=pretrained, gradient_norm=optax.tree.norm(grads)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, known)


def test_no_gradient_yet_means_a_scale_of_one():
    transform = dx.adamr(0.1, weight_decay=0.5)
    params, pretrained = {"w": jnp.array([1.0])}, {"w": jnp.array([0.0])}
    updates, _ = transform.update({"w": jnp.zeros(1)}, transform.init(params), params, pretrained=pretrained)
    np.testing.assert_allclose(updates["w"], [-0.1 * 0.5])


def composed(name):
    """adamr inside each of optax's wrappers."""
    if name == "chain":
        return optax.chain(optax.clip_by_global_norm(0.5), dx.adamr(1e-2, weight_decay=1e-2))
    if name == "inject_hyperparams":
        return optax.inject_hyperparams(dx.adamr)(learning_rate=1e-2, weight_decay=1e-2)
    if name == "multi_steps":
        return optax.MultiSteps(dx.adamr(1e-2, weight_decay=1e-2), 2)
    if name == "masked":
        return optax.masked(dx.adamr(1e-2, weight_decay=1e-2), {"body": True, "frozen": False, "head": True})
    if name == "partition":
        parts = {"train": dx.adamr(1e-2, weight_decay=1e-2), "rest": optax.set_to_zero()}
        return optax.partition(parts, {"body": "train", "frozen": "rest", "head": "train"})
    return dx.adamr(optax.cosine_decay_schedule(1e-2, 10), weight_decay=1e-2, amsgrad=True)


@pytest.mark.parametrize(
    "name", ["chain", "inject_hyperparams", "multi_steps", "masked", "partition", "schedule"]
)
def test_composes_and_compiles_once(name):
    transform = composed(name)
    params, pretrained = random_tree(0), without_head(random_tree(1))
    state = transform.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params, pretrained=pretrained)
        return optax.apply_updates(params, updates), state

    seen = [params]
    for t in range(4):
        params, state = step(params, state, gradients(params, t))
        seen.append(params)
    assert step._cache_size() == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), seen[0], seen[-1])
    assert moved["body"] == {"weight": True, "bias": True} and moved["head"]["weight"]
    if name == "multi_steps":
        jax.tree.map(np.testing.assert_array_equal, seen[0], seen[1])
    if name == "inject_hyperparams":
        assert float(state.hyperparams["weight_decay"]) == pytest.approx(1e-2)
    if name in ("masked", "partition"):  # masked parameters do not affect the scale
        alone = {k: random_tree(0)[k] for k in ("body", "head")}
        plain, plain_state = dx.adamr(1e-2, weight_decay=1e-2), None
        plain_state = plain.init(alone)
        for t in range(4):
            grads = {k: gradients(seen[t], t)[k] for k in alone}
            updates, plain_state = plain.update(grads, plain_state, alone, pretrained=pretrained)
            alone = optax.apply_updates(alone, updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            alone,
            {k: params[k] for k in alone},
        )


def test_updates_are_rounded_once_to_the_parameters_dtype():
    """Moments and arithmetic are float32; a mixed tree keeps each leaf's dtype."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    half["head"] = jax.tree.map(lambda x: x.astype(jnp.float16), half["head"])
    transform = dx.adamr(1e-5, weight_decay=1e-2)  # a rate near float16's resolution
    state = transform.init(half)
    assert {x.dtype for x in jax.tree.leaves((state[0].mu, state[0].nu))} == {jnp.dtype(jnp.float32)}
    pretrained = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(1))
    updates, state = transform.update(half, state, half, pretrained=pretrained)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (half, pretrained))
    expected, _ = transform.update(wide[0], transform.init(wide[0]), wide[0], pretrained=wide[1])
    assert [x.dtype for x in jax.tree.leaves(updates)] == [x.dtype for x in jax.tree.leaves(half)]
    jax.tree.map(lambda u, e: np.testing.assert_array_equal(u, e.astype(u.dtype)), updates, expected)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    grads, _ = dx.adamr(1e-3, weight_decay=0.0).update(half, state)  # no parameters: the gradients' dtypes
    assert [x.dtype for x in jax.tree.leaves(grads)] == [x.dtype for x in jax.tree.leaves(half)]


# What optax requires of every optimizer (seven tests in optax/contrib/_common_test.py): accepts unknown extra
# arguments, compiles once, converges, keeps shapes and dtypes of parameters and state, works with
# accumulation and inject_hyperparams (above), and accepts a schedule as a rate.

DTYPES = ["float32", "bfloat16", "float16", "float64"]
TARGETS = {
    "vector": (jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0])),
    "matrix": (jnp.zeros((2, 2)), jnp.array([[3.0, -2.0], [1.0, 4.0]])),
    "pair": ((jnp.zeros(3), jnp.zeros((2, 2))), (jnp.array([1.0, -1.0, 2.0]), jnp.eye(2))),
    "valley": (jnp.zeros(2), jnp.ones(2)),
}


def far(name, target):
    """Distance from the target: squared, or the Rosenbrock function."""
    if name == "valley":
        return lambda p: (1.0 - p[0]) ** 2 + 100.0 * (p[1] - p[0] ** 2) ** 2
    return lambda params: optax.tree.norm(optax.tree.sub(params, target), squared=True)


@pytest.mark.parametrize("name", TARGETS)
def test_it_gets_to_the_minimum(name):
    start, target = TARGETS[name]
    transform = dx.adamr(1e-2, weight_decay=1e-4)
    state = optax.tree.map_params(transform, lambda leaf: leaf, transform.init(start))

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(
            jax.grad(far(name, target))(params), state, params, pretrained=target, not_known=1
        )
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, state), length=20_000)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-2), params, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes_are_stable(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {"w": jnp.array([1.0, 2.0], dtype), "b": jnp.ones((), dtype)}
        pretrained = jax.tree.map(jnp.zeros_like, params)
        plain = dx.adamr(optax.constant_schedule(1e-2), weight_decay=1e-2, amsgrad=True)
        for transform in (plain, optax.apply_if_finite(plain, 2), optax.MultiSteps(plain, 2)):
            state = transform.init(params)

            @jax.jit
            def step(params, state, grads, transform=transform):
                updates, state = jax.lax.cond(
                    jnp.isfinite(state_sum(state)),  # not a compile-time constant
                    lambda: transform.update(grads, state, params, pretrained=pretrained),
                    lambda: (params, state),
                )
                return optax.apply_updates(params, updates), state

            after, later = step(params, state, params)
            again, _ = step(after, later, params)
            assert step._cache_size() == 1
            for a, b in zip(jax.tree.leaves((again, later)), jax.tree.leaves((params, state)), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (again["w"] < params["w"]).all()


def state_sum(state):
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_with_a_nan_is_left_out(dtype):
    params = {"w": jnp.array([1.0, 2.0], dtype)}
    transform = optax.apply_if_finite(dx.adamr(1e-2), 2)
    state = transform.init(params)
    nan = {"w": jnp.array([jnp.nan, 1.0], dtype)}
    updates, state = transform.update(nan, state, params, pretrained=params)
    assert updates["w"].dtype == dtype and not updates["w"].any() and int(state.notfinite_count) == 1
    updates, state = transform.update(params, state, params, pretrained=params)
    assert updates["w"].dtype == dtype and (updates["w"] < 0).all() and int(state.inner_state[0].count) == 1


def test_float64_is_float64():
    """Under x64 the whole step is: matches Algorithm 1 far below float32's resolution."""
    with jax.enable_x64(True):
        wide = lambda seed: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), random_tree(seed))  # noqa: E731
        start, pretrained, grads = wide(0), wide(1), wide(2)
        transform = dx.adamr(1e-2, weight_decay=1e-2)
        params, state = start, transform.init(start)
        update = jax.jit(transform.update)
        for _ in range(3):
            updates, state = update(grads, state, params, pretrained=pretrained)
            params = optax.tree.add(params, updates)
        assert {x.dtype for x in jax.tree.leaves((params, state[0].mu, state[0].nu_mean))} == {
            jnp.dtype(jnp.float64)
        }
        expected = algorithm_1(
            flat(start), flat(pretrained), lambda theta, t: flat(grads), [1e-2] * 3,
            decay=1e-2, norm="l2", amsgrad=False, pulled=set(flat(start)),
        )  # fmt: skip
        for name, leaf in flat(params).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-12)


def test_each_group_of_a_partition_pulls_what_has_a_pretrained_value():
    """Two rates, body and head: the head's group has no pretrained value at all."""
    params, pretrained, grads = random_tree(0), without_head(random_tree(1)), random_tree(2)
    groups = {"body": dx.adamr(1e-3, weight_decay=1e-2), "head": dx.adamr(1e-2, weight_decay=1e-2)}
    transform = optax.partition(groups, {"body": "body", "frozen": "body", "head": "head"})
    updates, _ = jax.jit(transform.update)(grads, transform.init(params), params, pretrained=pretrained)
    free = dx.adamr(1e-2, weight_decay=0.0)
    expected, _ = free.update({"head": grads["head"]}, free.init({"head": params["head"]}))
    np.testing.assert_allclose(updates["head"]["weight"], expected["head"]["weight"], rtol=1e-6)
    bodies = [without_head(tree) for tree in (grads, params)]
    expected, _ = groups["body"].update(
        bodies[0], groups["body"].init(bodies[1]), bodies[1], pretrained=pretrained
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), without_head(updates), expected)
    with pytest.raises(ValueError, match="no parameter has a pretrained value"):  # of neither group
        transform.update(grads, transform.init(params), params, pretrained={"model": pretrained})


@pytest.mark.parametrize("wrap", ["partition", "masked"])
def test_the_norm_of_all_gradients_is_not_taken_for_that_of_a_group(wrap):
    params, pretrained, grads = random_tree(0), without_head(random_tree(1)), random_tree(2)
    inner = dx.adamr(1e-3, weight_decay=1e-2)
    transform = {
        "partition": optax.partition({"a": inner, "b": inner}, {"body": "a", "frozen": "a", "head": "b"}),
        "masked": optax.masked(inner, {"body": True, "frozen": True, "head": False}),
    }[wrap]
    state = transform.init(params)
    expected, _ = transform.update(grads, state, params, pretrained=pretrained)
    norm = 1e3 * optax.tree.norm(grads)
    found, _ = transform.update(grads, state, params, pretrained=pretrained, gradient_norm=norm)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_complex_parameters_are_refused():
    with pytest.raises(dx.DarexError, match="'w' is complex"):
        dx.adamr(1e-3).init({"w": jnp.ones(2, jnp.complex64)})


def test_shardings_are_kept_and_buffers_can_be_donated():
    mesh = dx.make_mesh(data=1)
    shapes = {"a": (16, 8), "b": (24,)}
    place = lambda tree: jax.device_put(tree, {  # noqa: E731
        "a": NamedSharding(mesh, PartitionSpec("model", None)),
        "b": NamedSharding(mesh, PartitionSpec("model")),
    })  # fmt: skip
    params, pretrained, grads = (random_tree(i, shapes=shapes) for i in range(3))
    transform = dx.adamr(1e-3, weight_decay=1e-2)

    def step(params, state, grads, pretrained):
        updates, state = transform.update(grads, state, params, pretrained=pretrained)
        return optax.apply_updates(params, updates), state

    expected, _ = jax.jit(step)(params, transform.init(params), grads, pretrained)
    sharded = place(jax.tree.map(jnp.copy, params))
    state = transform.init(sharded)
    assert state[0].mu["a"].sharding == sharded["a"].sharding
    after, state = jax.jit(step, donate_argnums=(0, 1))(sharded, state, place(grads), place(pretrained))
    assert sharded["a"].is_deleted()
    for name in shapes:
        assert after[name].sharding.is_equivalent_to(place(params)[name].sharding, len(shapes[name]))
        assert state[0].nu[name].sharding.is_equivalent_to(after[name].sharding, len(shapes[name]))
        np.testing.assert_allclose(after[name], expected[name], rtol=1e-6)


def test_the_count_saturates():
    transform = dx.adamr(1e-3, weight_decay=1e-2)
    params = random_tree(0)
    (first, *rest) = transform.init(params)
    state = (first._replace(count=jnp.int32(2**31 - 1)), *rest)
    updates, state = transform.update(params, state, params, pretrained=random_tree(1))
    assert int(state[0].count) == 2**31 - 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_errors_are_explained():
    transform = dx.adamr(1e-3)
    params = random_tree(0)
    state = transform.init(params)
    with pytest.raises(ValueError, match=r"needs pretrained: call update\(grads, state, params, pret"):
        transform.update(params, state, params)
    with pytest.raises(ValueError, match="needs params"):
        transform.update(params, state, pretrained=params)
    with pytest.raises(
        ValueError, match="no parameter has a pretrained value: the parameters are named body"
    ):
        transform.update(params, state, params, pretrained={"bert": params})
    other = params | {"head": {"weight": jnp.zeros((2, 7))}}
    with pytest.raises(ValueError, match=r"'head.weight' is \(3, 7\), its pretrained value \(2, 7\); remove"):
        transform.update(params, state, params, pretrained=other)
    with pytest.raises(ValueError, match="norm is 'l2' or 'l1', got 'l3'"):
        dx.adamr(1e-3, norm="l3")


def test_more_entries_than_int32_can_count():
    """Abstract shapes with 3.5 billion entries, as in a Llama of 7 billion parameters."""
    huge = {"w": jax.ShapeDtypeStruct((70_000, 50_000), jnp.float32)}
    transform = dx.adamr(1e-3)
    state = jax.eval_shape(transform.init, huge)
    update = lambda g, s, p, p0: transform.update(g, s, p, pretrained=p0)  # noqa: E731
    updates, _ = jax.eval_shape(update, huge, state, huge, huge)
    assert updates["w"].shape == (70_000, 50_000)
    assert [x.shape for x in jax.eval_shape(delta_size, huge, huge)] == [(), ()]
