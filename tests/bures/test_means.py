"""Means and interpolation of points and of adapters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax import bures
from balora_jax.adapters import PeftModule, interpolate_adapters, read_peft, write_peft
from balora_jax.adapters.peft import from_modules
from balora_jax.bures import Point, Tangent
from balora_jax.cli import main

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")


def test_frechet_mean_is_where_the_logarithms_cancel():
    points = [bures.random_point(jax.random.key(0), (6, 5), 2)]
    for k in (1, 2):
        step = bures.random_tangent_vector(jax.random.key(k), points[0])
        points.append(bures.retraction(points[0], Tangent(*(0.8 * x for x in step))))
    weights = np.array([1.0, 2.0, 3.0])
    mean = jax.jit(lambda *points: bures.frechet_mean(points, weights))(*points)
    bures.check_point(mean)
    log = jax.jit(bures.log)
    total = sum(w * np.concatenate([x.ravel() for x in log(mean, p)]) for w, p in zip(weights, points, strict=True))
    np.testing.assert_allclose(total, 0, atol=1e-12)
    pair = jax.jit(lambda *points: bures.frechet_mean(points, weights[1:]))(*points[1:])
    between = jax.jit(bures.interpolation)(*points[1:], 0.6)
    np.testing.assert_allclose(bures.distance(pair, between), 0, atol=1e-12)
    with pytest.raises(ValueError, match=r"weights must be \(3,\), one for each point, got shape \(2,\)"):
        bures.frechet_mean(points, [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one point"):
        bures.frechet_mean([])


def adapters(scale=2.0):
    """Two adapters of rank 1, whose geodesics are known, in unbalanced gauges; the second has another scale."""
    rng = np.random.default_rng(0)
    found = []
    for size, factor in ((3.0, 5.0), (0.2, 1 / 3)):
        modules = {}
        for name, shape in (("h.0.up", (6, 8)), ("h.1.up", (6, 8)), ("h.0.down", (8, 6))):
            base = np.random.default_rng(len(modules))
            a, b = (base.standard_normal(s) + 0.5 * rng.standard_normal(s) for s in ((shape[0], 1), (1, shape[1])))
            modules[name] = PeftModule((a * factor).astype("float32"), (size * b / factor).astype("float32"), scale)
        found.append(from_modules(modules))
        scale = 4.0
    return found


def update(low_rank):
    return low_rank.scale * low_rank.lora_a.astype(float) @ low_rank.lora_b.astype(float)


def cone(first, second, weight):
    """The point of the geodesic of matrices of rank 1: a straight line in the cone over two spheres."""
    (u1, s1, v1), (u2, s2, v2) = (np.linalg.svd(x) for x in (first, second))
    sign = np.sign(u1[:, 0] @ u2[:, 0] + v1[0] @ v2[0])
    u1, v1, u2, v2 = u1[:, 0], v1[0], sign * u2[:, 0], sign * v2[0]
    alpha, beta = np.arccos(u1 @ u2), np.arccos(v1 @ v2)
    angle = np.sqrt((alpha**2 + beta**2) / 2)
    line = (1 - weight) * np.sqrt(s1[0]) + weight * np.sqrt(s2[0]) * np.exp(1j * angle)
    share = np.angle(line) / angle

    def turned(x, y, whole):
        return (np.sin((1 - share) * whole) * x + np.sin(share * whole) * y) / np.sin(whole)

    return np.abs(line) ** 2 * np.outer(turned(u1, u2, alpha), turned(v1, v2, beta))


WAYS = {
    "geodesic": cone,
    "products": lambda x, y, w: (lambda u, s, v: s[0] * np.outer(u[:, 0], v[0]))(*np.linalg.svd((1 - w) * x + w * y)),
}


@pytest.mark.parametrize("how", WAYS)
def test_merged_adapters_are_what_closed_forms_say(how, tmp_path, capsys):
    pair = adapters()
    for folder, adapter in zip(("first", "second"), pair, strict=True):
        write_peft(adapter, tmp_path / folder)
    (tmp_path / "first" / "README.md").write_text("mine\n")
    arguments = ["merge-adapters", *(str(tmp_path / x) for x in ("first", "second", "out")), "--weight", "0.3"]
    assert main([*arguments, "--how", how]) == 0
    assert f"3 pairs, {how} at weight 0.3; the updates differ from those of" in capsys.readouterr().out
    out = read_peft(tmp_path / "out")
    assert out.config["lora_alpha"] == pair[0].config["lora_alpha"]
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"
    first, second = (adapter.modules() for adapter in pair)
    for name, found in out.modules().items():
        expected = WAYS[how](update(first[name]), update(second[name]), 0.3)
        assert found.lora_a.dtype == np.float32
        np.testing.assert_allclose(update(found), expected, atol=2e-6 * np.abs(expected).max())


def test_averages_of_factors_and_the_ends():
    first, second = adapters()
    average = interpolate_adapters(first, second, 0.5, how="factors").modules()["h.1.up"]
    x, y = (adapter.modules()["h.1.up"] for adapter in (first, second))
    root = np.sqrt(y.scale / x.scale)
    np.testing.assert_allclose(average.lora_a, (x.lora_a + root * y.lora_a) / 2, rtol=1e-5)
    for weight, end in ((0.0, first), (1.0, second)):
        found = interpolate_adapters(first, second, weight).modules()
        for name, low_rank in end.modules().items():
            np.testing.assert_allclose(
                update(found[name]), update(low_rank), atol=2e-6 * np.abs(update(low_rank)).max()
            )


def test_adapters_that_do_not_fit_are_refused(tmp_path, capsys):
    first, second = adapters()
    modules = second.modules()

    def other(name, low_rank):
        return from_modules({**modules, name: low_rank})

    a, b, scale, _ = modules["h.1.up"]
    merge = partial(interpolate_adapters, first, weight=0.5)
    with pytest.raises(ValueError, match=r"must have the same modules, but only one has h\.2"):
        merge(other("h.2", modules["h.0.up"]))
    with pytest.raises(ValueError, match=r"h\.1\.up: the factors must have the same shapes in both"):
        merge(other("h.1.up", PeftModule(np.ones((6, 2), "float32"), np.ones((2, 8), "float32"), scale)))
    with pytest.raises(ValueError, match=r"h\.1\.up: the update lacks rank"):
        merge(other("h.1.up", PeftModule(a, 0 * b, scale)))
    with pytest.raises(ValueError, match=r"weight must be from 0 to 1, got 1\.5"):
        merge(second, weight=1.5)
    write_peft(first, tmp_path / "first")
    assert main(["merge-adapters", str(tmp_path / "first"), str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "SECOND: " in capsys.readouterr().err
    assert main(["merge-adapters", *2 * [str(tmp_path / "first")], str(tmp_path / "out"), "--weight", "2"]) == 2
    assert "--weight must be from 0 to 1, got 2.0" in capsys.readouterr().err


def test_interpolation_does_not_see_the_gauge():
    first, second = (bures.random_point(jax.random.key(k), (6, 5), 2) for k in (0, 1))
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((2, 2)))[0]
    between = jax.jit(bures.interpolation)
    other = between(first, Point(second[0] @ turn, turn.T @ second[1]), jnp.asarray(0.3))
    np.testing.assert_allclose(bures.distance(other, between(first, second, jnp.asarray(0.3))), 0, atol=1e-10)
