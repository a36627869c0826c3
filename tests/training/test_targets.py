"""Accelerators by name, and what a step takes on them."""

import pytest

from balora_jax.errors import ConfigError
from balora_jax.training.hlo import Program
from balora_jax.training.roofline import roofline
from balora_jax.training.targets import CHIPS, parse_target

PROGRAM = Program("""HloModule step

ENTRY %main (p: bf16[4096,4096]) -> bf16[4096,4096] {
  %p = bf16[4096,4096]{1,0} parameter(0)
  %r = bf16[4096,4096]{1,0} all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add
  %d = bf16[4096,4096]{1,0} dot(%r, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""")


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [("h100", 1, "h100:1"), ("h100:8", 8, "h100:8"), ("v5e:4x4", 16, "v5e:4x4"), ("v5p", 1, "v5p:1x1x1")],
)
def test_names(text, size, shown):
    target = parse_target(text)
    assert target.size == size
    assert str(target) == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100:0", "their number, as h100:8"),
        ("h100:2x2", "their number, as h100:8"),
        ("v5e:16", "the chips along 2 axes, as v5e:4x4"),
        ("v5p:4x4", "the chips along 3 axes, as v5p:4x4x4"),
        ("H100", "one of a100-40gb, a100-80gb, h100, h200, v5e, v5p, v6e"),
        ("h100:12", "nodes of 8"),
    ],
)
def test_mistakes_are_told(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_target(text)


@pytest.mark.parametrize("name", CHIPS)
def test_times_are_those_of_the_chip(name):
    """By hand: a product of 2 x 4096^3 operations, an all-reduce of 32 MiB over 16 devices."""
    chip = CHIPS[name]
    target = parse_target(f"{name}:{'16' if chip.platform == 'cuda' else 'x'.join(['4', '4', '1'][: len(axes(name))])}")
    found = roofline(PROGRAM, target)
    assert found.compute == pytest.approx(2 * 4096**3 / chip.peak["bfloat16"])
    size = 2 * 4096**2
    assert found.memory == pytest.approx((2 + 3) * size / chip.bandwidth)
    between = chip.network if chip.platform == "cuda" else chip.link  # 16 GPUs are two nodes
    assert found.network == pytest.approx(2 * 15 / 16 * size / between)
    assert found.fastest == max(found.parts.values()) == found.parts[found.bound]
    assert found.slowest == pytest.approx(sum(found.parts.values()))


def axes(name):
    """The axes of the torus of a kind of TPU."""
    return parse_target(name).shape


def test_a_missing_compiler_is_told(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"h100:8 needs XLA's compiler for it: pip install 'balora-jax\[estimate-gpu"):
        parse_target("h100:8").devices()
    with pytest.raises(ConfigError, match=r"pip install 'balora-jax\[estimate-tpu\]'"):
        parse_target("v5e:2x2").devices()
