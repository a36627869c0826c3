"""Spectra and condition numbers of a run's pairs, against dense decompositions."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from balora_jax.conditioning import factorization_condition_number, least_condition_number
from balora_jax.training import run
from balora_jax.training.comparison import load_runs
from balora_jax.training.spectra import conditions, spectra
from balora_jax.training.trained import load_trained


def state(shape_a, shape_b, seed=0):
    rng = np.random.default_rng(seed)
    return nnx.State(
        {
            "layers": {
                "up": {
                    "lora_a": nnx.LoRAParam(jax.numpy.asarray(rng.normal(size=shape_a), "float32")),
                    "lora_b": nnx.LoRAParam(jax.numpy.asarray(rng.normal(size=shape_b), "float32")),
                }
            }
        }
    )


@pytest.mark.parametrize("leading", [(), (3,)])
def test_they_are_those_of_the_dense_matrices(leading):
    adapters = state((*leading, 7, 3), (*leading, 3, 5))
    factors = [np.asarray(adapters["layers"]["up"][name][...], float).reshape(-1, *shape) for name, shape in
               (("lora_a", (7, 3)), ("lora_b", (3, 5)))]  # fmt: skip
    found = list(spectra(adapters))
    assert [one.name for one in found] == ([f"layers/up[{i}]" for i in range(3)] if leading else ["layers/up"])
    for one, a, b in zip(found, *factors, strict=True):
        for own, matrix in zip(one[1:], (a, b, a @ b), strict=True):
            np.testing.assert_allclose(own, np.linalg.svd(matrix, compute_uv=False)[:3], rtol=1e-5)
        np.testing.assert_allclose(one.condition, factorization_condition_number(a, b), rtol=1e-5)
        np.testing.assert_allclose(one.least_condition, least_condition_number(one.product, 3), rtol=1e-5)


def test_a_zero_factor_is_infinitely_ill_conditioned_and_what_is_not_finite_is_left_out():
    zero = state((7, 3), (3, 5))
    zero["layers"]["up"]["lora_b"][...] *= 0
    assert conditions(zero) == {"condition": np.inf, "least_condition": np.inf}
    zero["layers"]["up"]["lora_b"][...] += np.nan
    assert conditions(zero) == {}


def test_a_run_records_them(config, tmp_path):
    config = dataclasses.replace(config, method="balora", balance=dataclasses.replace(config.balance, least_ratio=0.0))
    run(config, {}, tmp_path / "out", Console(quiet=True))
    (found,), _ = load_runs([tmp_path / "out"])
    first, *later = found.evaluations
    assert float(first["condition"]) == np.inf
    for record in later:
        np.testing.assert_allclose(record["condition"], record["least_condition"], rtol=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "spectra.jsonl").read_text().splitlines()]
    assert lines == found.spectra
    model = load_trained(tmp_path / "out").model
    for line in lines:
        path, _, index = line["pair"].removesuffix("]").partition("[")
        layer = functools.reduce(getattr, path.split("/"), model)
        product = np.asarray(layer.lora_a[...] @ layer.lora_b[...])[int(index)] * config.adapter.alpha / 3
        np.testing.assert_allclose(line["product"], np.linalg.svd(product, compute_uv=False)[:3], rtol=1e-4)


def test_a_method_without_pairs_has_none(config, tmp_path):
    run(dataclasses.replace(config, method="full"), {}, tmp_path / "out", Console(quiet=True))
    (found,), _ = load_runs([tmp_path / "out"])
    assert found.spectra == []
    assert not any("condition" in record for record in found.evaluations)
