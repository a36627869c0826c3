"""Spectra and condition numbers of a run's pairs, against dense decompositions."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from balora_jax.training import RunError, run
from balora_jax.training.comparison import load_runs
from balora_jax.training.spectra import conditions, diagnoses
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
    found = list(diagnoses(adapters, -2.0))
    assert [name for name, _ in found] == ([f"layers/up[{i}]" for i in range(3)] if leading else ["layers/up"])
    for (_, one), a, b in zip(found, *factors, strict=True):
        np.testing.assert_allclose(one.singular_values, np.linalg.svd(2 * a @ b, compute_uv=False)[:3], rtol=1e-6)
        (sa, sb) = (np.linalg.svd(x, compute_uv=False) for x in (a, b))
        np.testing.assert_allclose(one.condition_number, (sa[0] ** 2 + sb[0] ** 2) / min(sa[-1], sb[-1]) ** 2)
    medians = conditions(adapters)
    np.testing.assert_allclose(medians["condition"], np.median([one.condition_number for _, one in found]))
    np.testing.assert_allclose(medians["least_condition"], np.median([one.least_condition_number for _, one in found]))


def test_a_zero_factor_is_infinitely_ill_conditioned_and_what_is_not_finite_is_left_out():
    zero = state((7, 3), (3, 5))
    zero["layers"]["up"]["lora_b"][...] *= 0
    assert conditions(zero) == {"condition": np.inf, "least_condition": np.inf}
    zero["layers"]["up"]["lora_b"][...] += np.nan
    assert conditions(zero) == {}


def test_a_rank_above_a_side_is_told_too():
    (_, one), = diagnoses(state((2, 4), (4, 9)))  # fmt: skip
    assert one.singular_values.shape == (2,)
    assert one.condition_number == np.inf


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
        np.testing.assert_allclose(line["singular_values"], np.linalg.svd(product, compute_uv=False)[:3], rtol=1e-4)
        assert line["gap"] < 1e-5


def test_a_broken_file_is_named(config, tmp_path):
    run(config, {}, tmp_path / "out", Console(quiet=True))
    for line in ("{", "[]", '{"member": "lora"}', '{"member": "lora", "pair": "x", "singular_values": ["a"]}'):
        (tmp_path / "out" / "spectra.jsonl").write_text(line + "\n")
        with pytest.raises(RunError, match=r"spectra\.jsonl, line 1"):
            load_runs([tmp_path / "out"])


def test_a_method_without_pairs_has_none(config, tmp_path):
    run(dataclasses.replace(config, method="full"), {}, tmp_path / "out", Console(quiet=True))
    (found,), _ = load_runs([tmp_path / "out"])
    assert found.spectra == []
    assert not any("condition" in record for record in found.evaluations)
