from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen, nnx
from oracles import gap, same_bits

from balora_jax import Pair, balance, find_pairs
from balora_jax.pairs import read_pairs, write_pairs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


class NnxModel(nnx.Module):
    """A linear layer, einsum layers with several contracted or remaining axes, and a raw einsum."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 12, rngs=rngs)])
        self.query = nnx.Einsum("bd,dnh->bnh", (6, 3, 4), rngs=rngs)
        self.out = nnx.Einsum("bnh,nhd->bd", (3, 4, 6), rngs=rngs)
        self.key_value = nnx.Param(normal(2, 6, 3, 4))

    def __call__(self, x):
        h = self.out(self.query(x))
        return self.layers[0](h), jnp.einsum("bd,sdnh->sbnh", h, self.key_value[...])


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.DenseGeneral(6, axis=(-2, -1))(linen.DenseGeneral((3, 4))(linen.Dense(6)(x)))


X = normal(5, 6)
QWIX_NNX_PAIRS = [
    Pair("key_value_lora_a", "key_value_lora_b", batch_axes=0),
    Pair("layers/0/kernel_lora_a", "layers/0/kernel_lora_b", batch_axes=0),
    Pair("out/kernel_lora_a", "out/kernel_lora_b", batch_axes=0),
    Pair("query/kernel_lora_a", "query/kernel_lora_b", batch_axes=0),
]


@pytest.fixture(scope="module")
def qwix_model():
    provider = qwix.LoraProvider(
        module_path=".*", rank=2, alpha=4.0, lora_b_initializer=jax.nn.initializers.normal(0.1)
    )
    return qwix.apply_lora_to_model(NnxModel(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))


def stacked_layers(rngs):
    return nnx.vmap(lambda rngs: nnx.LoRALinear(6, 12, lora_rank=2, rngs=rngs))(rngs.split(3))


def peft(weight_a, weight_b, *, adapter=""):
    """A flat PEFT state with what stands beside the pair in such a file."""
    base = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{base}.lora_A{adapter}.weight": weight_a,
        f"{base}.lora_B{adapter}.bias": normal(5),
        f"{base}.lora_B{adapter}.weight": weight_b,
        f"{base}.lora_magnitude_vector{adapter}": normal(5),
        "base_model.model.lm_head.weight": normal(4, 6),
    }


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"

# name: (tree, its pairs, the contraction of each pair's leaves to the dense product)
CONVENTIONS = {
    "nested dict": (
        {"mlp": {"up": {"lora_a": normal(6, 2), "lora_b": normal(2, 12), "kernel": normal(6, 12)}}},
        [Pair("mlp/up/lora_a", "mlp/up/lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "list": (
        [{"lora_a": normal(6, 2), "lora_b": normal(2, 12)}, {"bias": normal(5)}],
        [Pair("0/lora_a", "0/lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "flat with dots": (
        {"up.lora_a": normal(6, 2), "up.lora_b": normal(2, 12), "up.lora_alpha": normal(1)},
        [Pair("up.lora_a", "up.lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "names that only look alike": (
        {"x_lora_a": normal(6, 2), "x_lora_b": normal(2, 12), "lora_ab": normal(3), "flora_a": normal(3)},
        [Pair("x_lora_a", "x_lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "query einsum": (
        {"w_lora_a": normal(6, 2), "w_lora_b": normal(2, 3, 4), "w": normal(6, 3, 4)},
        [Pair("w_lora_a", "w_lora_b", batch_axes=0)],
        ["dR,Rnh->dnh"],
    ),
    "output einsum": (
        {"w_lora_a": normal(2, 3, 2), "w_lora_b": normal(2, 12)},
        [Pair("w_lora_a", "w_lora_b", batch_axes=0)],
        ["nhR,Rd->nhd"],
    ),
    "einsum of many axes": (
        {"w_lora_a": normal(2, 3, 2), "w_lora_b": normal(2, 4, 3)},
        [Pair("w_lora_a", "w_lora_b", batch_axes=0)],
        ["nhR,Rde->nhde"],
    ),
    "stacked layers": (
        {"lora_a": normal(3, 6, 2), "lora_b": normal(3, 2, 12)},
        [Pair("lora_a", "lora_b", batch_axes=1)],
        ["lir,lro->lio"],
    ),
    "stacked einsum": (
        {"w_lora_a": normal(3, 6, 2), "w_lora_b": normal(3, 2, 3, 4)},
        [Pair("w_lora_a", "w_lora_b", batch_axes=1)],
        ["ldR,lRnh->ldnh"],
    ),
    "layers of experts": (
        {"lora_a": normal(2, 3, 6, 2), "lora_b": normal(2, 3, 2, 12)},
        [Pair("lora_a", "lora_b", batch_axes=2)],
        ["leir,lero->leio"],
    ),
    "as many layers as ranks": (
        {"lora_a": normal(2, 6, 2), "lora_b": normal(2, 2, 12)},
        [Pair("lora_a", "lora_b", batch_axes=1)],
        ["lir,lro->lio"],
    ),
    "nnx.LoRALinear": (
        nnx.state(nnx.LoRALinear(6, 12, lora_rank=2, rngs=nnx.Rngs(0))),
        [Pair("lora/lora_a", "lora/lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "stacked nnx.LoRALinear": (
        nnx.state(stacked_layers(nnx.Rngs(0)), nnx.LoRAParam),
        [Pair("lora/lora_a", "lora/lora_b", batch_axes=1)],
        ["lir,lro->lio"],
    ),
    "PEFT file": (
        peft(normal(2, 6), normal(12, 2)),
        [Pair(f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight", True, 0)],
        ["ri,or->io"],
    ),
    "PEFT module": (
        peft(normal(2, 6), normal(12, 2), adapter=".default"),
        [Pair(f"{Q_PROJ}.lora_A.default.weight", f"{Q_PROJ}.lora_B.default.weight", True, 0)],
        ["ri,or->io"],
    ),
    "nested PEFT": (
        {
            "q": {
                "lora_A": {"default": {"weight": normal(2, 6)}},
                "lora_B": {"default": {"weight": normal(12, 2), "bias": normal(5)}},
                "lora_magnitude_vector": {"default": {"weight": normal(5)}},
            }
        },
        [Pair("q/lora_A/default/weight", "q/lora_B/default/weight", True, 0)],
        ["ri,or->io"],
    ),
    "PEFT embedding": (
        {"embed.lora_embedding_A": normal(2, 6), "embed.lora_embedding_B": normal(12, 2)},
        [Pair("embed.lora_embedding_A", "embed.lora_embedding_B", True, 0)],
        ["ri,or->io"],
    ),
    "stacked PEFT": (
        {"lora_A": normal(3, 2, 6), "lora_B": normal(3, 12, 2)},
        [Pair("lora_A", "lora_B", True, 1)],
        ["lri,lor->lio"],
    ),
}
conventions = pytest.mark.parametrize(("tree", "expected", "contractions"), CONVENTIONS.values(), ids=CONVENTIONS)


def leaf(tree, path):
    """The array at a path, by indexing."""
    for key in path.split("/"):
        tree = tree[int(key) if key.isdigit() else key]
    return np.asarray(tree[...], float)


def filled(tree):
    """The tree with random factors in place of zeros."""
    return jax.tree.map(lambda x: x if jnp.any(x) else normal(*x.shape), tree)


def balanced(tree, pairs):
    return write_pairs(tree, pairs, [balance(*factors, gauge="symmetric") for factors in read_pairs(tree, pairs)])


@conventions
def test_finds_the_pairs_and_their_layout(tree, expected, contractions):
    assert find_pairs(tree) == tuple(expected)
    assert find_pairs(jax.eval_shape(lambda: tree)) == tuple(expected)
    assert len(contractions) == len(expected)


@conventions
def test_balancing_keeps_the_products_that_the_tree_stands_for(tree, expected, contractions):
    tree = filled(tree)
    pairs = find_pairs(tree)
    new_tree = balanced(tree, pairs)
    assert jax.tree.structure(new_tree) == jax.tree.structure(tree)
    for pair, contraction in zip(expected, contractions, strict=True):
        old, new = ([leaf(x, path) for path in (pair.path_a, pair.path_b)] for x in (tree, new_tree))
        assert [x.shape for x in old] == [x.shape for x in new]
        np.testing.assert_allclose(np.einsum(contraction, *new), np.einsum(contraction, *old), atol=1e-5)
        assert not any(np.allclose(*sides, atol=1e-3) for sides in zip(old, new, strict=True))
    for a, b in read_pairs(new_tree, pairs):
        assert gap(a, b).max() < 1e-5
    changed = sum(not same_bits(x, y) for x, y in zip(*map(jax.tree.leaves, (tree, new_tree)), strict=True))
    assert changed == 2 * len(expected)


@conventions
def test_writing_what_was_read_changes_nothing(tree, expected, contractions):
    pairs = find_pairs(tree)
    factors = read_pairs(tree, pairs)
    for (a, b), pair in zip(factors, expected, strict=True):
        assert a.ndim == b.ndim == 3
        assert a.shape[0] == b.shape[0] == np.prod(leaf(tree, pair.path_a).shape[: pair.batch_axes])
        assert a.shape[2] == b.shape[1] == 2
    new_tree = write_pairs(tree, pairs, factors)
    assert all(same_bits(x, y) for x, y in zip(*map(jax.tree.leaves, (tree, new_tree)), strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda model: nnx.state(model),
        lambda model: nnx.state(model, nnx.Param),
        lambda model: nnx.split(model, nnx.LoRAParam, ...)[1],
        lambda model: nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)),
        lambda model: nnx.to_pure_dict(nnx.state(model)),
    ],
    ids=["all state", "params", "split", "pure dict of factors", "pure dict"],
)
def test_views_of_a_qwix_model(qwix_model, view):
    assert sorted(find_pairs(view(qwix_model)), key=lambda pair: pair.path_a) == QWIX_NNX_PAIRS


def test_a_balanced_qwix_nnx_model_computes_the_same(qwix_model):
    before = qwix_model(X)
    graph, factors, rest = nnx.split(qwix_model, nnx.LoRAParam, ...)
    pairs = find_pairs(factors)
    after = nnx.merge(graph, balanced(factors, pairs), rest)
    for x, y in zip(after(X), before, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    for a, b in read_pairs(nnx.state(after, nnx.LoRAParam), pairs):
        assert gap(a, b).max() < 1e-5
    without = nnx.merge(graph, jax.tree.map(jnp.zeros_like, factors), rest)
    assert all(jnp.abs(x - y).max() > 1e-2 for x, y in zip(without(X), before, strict=True))


def test_a_balanced_qwix_linen_model_computes_the_same():
    provider = qwix.LoraProvider(
        module_path=".*", rank=2, alpha=4.0, lora_b_initializer=jax.nn.initializers.normal(0.1)
    )
    model = qwix.apply_lora_to_model(LinenModel(), provider)
    variables = model.init(jax.random.key(0), X)
    pairs = find_pairs(variables)
    names = ("DenseGeneral_0", "DenseGeneral_1", "Dense_0")
    assert pairs == tuple(Pair(f"params/{n}/kernel_lora_a", f"params/{n}/kernel_lora_b", batch_axes=0) for n in names)
    after = balanced(variables, pairs)
    np.testing.assert_allclose(model.apply(after, X), model.apply(variables, X), atol=1e-5)
    for a, b in read_pairs(after, pairs):
        assert gap(a, b).max() < 1e-5


NAMED = {"left": normal(6, 2), "right": normal(2, 5), "stack": {"u": normal(2, 6, 2), "v": normal(2, 2, 5)}}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("left", "right")], [Pair("left", "right", batch_axes=0)]),
        (lambda params: [(k, "right") for k in params if k == "left"], [Pair("left", "right", batch_axes=0)]),
        ([Pair("stack/u", "stack/v")], [Pair("stack/u", "stack/v", batch_axes=1)]),
        ([Pair("stack/u", "stack/v", batch_axes=0)], [Pair("stack/u", "stack/v", batch_axes=0)]),
        ([Pair("right", "left", transposed=True)], [Pair("right", "left", True, 0)]),
        (
            (("left", "right"), Pair("stack/u", "stack/v", batch_axes=1)),
            [Pair("left", "right", batch_axes=0), Pair("stack/u", "stack/v", batch_axes=1)],
        ),
    ],
    ids=["sequence", "callable", "Pair", "batch_axes", "transposed", "two"],
)
def test_pairs_can_be_named(pairs, expected):
    found = find_pairs(NAMED, pairs)
    assert found == tuple(expected)
    for pair, (a, b) in zip(expected, read_pairs(NAMED, found), strict=True):
        leaf_a, leaf_b = leaf(NAMED, pair.path_a), leaf(NAMED, pair.path_b)
        if pair.transposed:
            dense, product = leaf_a.T @ leaf_b.T, a @ b
        elif pair.batch_axes:
            dense, product = leaf_a @ leaf_b, a @ b
        else:  # one pair, the axes beside the rank flattened
            dense, product = np.tensordot(leaf_a, leaf_b, 1), a @ b
        np.testing.assert_allclose(np.ravel(product), np.ravel(dense), rtol=1e-4, atol=1e-5)


def test_pairs_come_in_the_order_of_their_left_factors():
    tree = OrderedDict((name, jnp.ones((2, 2))) for name in ("y.lora_b", "x.lora_a", "x.lora_b", "y.lora_a"))
    assert [pair.path_a for pair in find_pairs(tree)] == ["x.lora_a", "y.lora_a"]


A, B = jnp.ones((6, 2)), jnp.ones((2, 5))
ERRORS = {
    "no B": ({"m": {"lora_a": A}}, None, ValueError, ["m/lora_a", "m/lora_b", "no partner"]),
    "no A": ({"m": {"w_lora_b": B}}, None, ValueError, ["m/w_lora_b", "m/w_lora_a", "no partner"]),
    "no PEFT B": ({"q.lora_A.weight": B}, None, ValueError, ["q.lora_A.weight", "q.lora_B.weight"]),
    "two conventions": ({"lora_a": A, "lora_B": B}, None, ValueError, ["lora_B", "no lora_A"]),
    "ranks differ": ({"m": {"lora_a": A, "lora_b": B.T}}, None, ValueError, ["m/lora_a", "m/lora_b", "(5, 2)"]),
    "PEFT of the other layout": ({"lora_A": A, "lora_B": B}, None, ValueError, ["lora_A", "(..., r, in)"]),
    "PEFT stacks differ": ({"lora_A": B[None], "lora_B": A}, None, ValueError, ["lora_A", "(1, 2, 5)", "(6, 2)"]),
    "one axis": ({"lora_a": A[0], "lora_b": B}, None, ValueError, ["lora_a", "(2,)"]),
    "integers": ({"m": {"lora_a": A, "lora_b": B.astype(int)}}, None, TypeError, ["m/lora_b", "int32"]),
    "a number": ({"m": {"lora_a": 1.0, "lora_b": B}}, None, TypeError, ["m/lora_a", "float"]),
    "no pair": ({"m": {"kernel": A}}, None, ValueError, ["m/kernel", "at least one LoRA pair", "pairs="]),
    "no leaf": ({}, None, ValueError, ["at least one LoRA pair"]),
    "path missing": ({"u": A, "v": B}, [("u", "m/w")], ValueError, ["'m/w'", "not in params"]),
    "path twice": ({"u": A, "v": B, "w": B}, [("u", "v"), ("u", "w")], ValueError, ["'u'", "twice"]),
    "pair with itself": ({"u": jnp.eye(2)}, [("u", "u")], ValueError, ["'u'", "twice"]),
    "none named": ({"lora_a": A, "lora_b": B}, [], ValueError, ["at least one pair"]),
    "batch_axes": ({"u": A, "v": B}, [Pair("u", "v", batch_axes=1)], ValueError, ["u", "v", "1 stacking axes"]),
    "named ranks differ": ({"u": A, "v": A}, [("u", "v")], ValueError, ["u", "v", "(6, 2)"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_path(case):
    tree, pairs, error, fragments = ERRORS[case]
    with pytest.raises(error) as caught:
        find_pairs(tree, pairs)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
