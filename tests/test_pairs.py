from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gap, same_bits

from balora_jax import (
    Pair,
    balance,
    balance_pairs,
    balance_tree,
    balora_project,
    find_pairs,
    read_pairs,
    write_pairs,
)
from balora_jax.trees import path_text

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
    "layers that were scanned along the last axis": (
        {"lora_a": normal(6, 2, 3), "lora_b": normal(2, 12, 3)},
        [Pair("lora_a", "lora_b", batch_axes=(2,))],
        ["irl,rol->iol"],
    ),
    "convolution": (
        {"lora_a": normal(3, 3, 6, 2), "lora_b": normal(1, 1, 2, 12)},
        [Pair("lora_a", "lora_b", batch_axes=0)],
        ["hwir,xyro->hwio"],
    ),
    "convolution of size 1": (
        {"lora_a": normal(1, 1, 6, 2), "lora_b": normal(1, 1, 2, 12)},
        [Pair("lora_a", "lora_b", batch_axes=2)],
        ["hwir,xyro->hwio"],
    ),
    "PEFT convolution": (
        {"conv.lora_A.weight": normal(2, 6, 3, 3), "conv.lora_B.weight": normal(12, 2, 1, 1)},
        [Pair("conv.lora_A.weight", "conv.lora_B.weight", True, 0)],
        ["rihw,orxy->oihw"],
    ),
    "as many heads as ranks": (
        {"w_lora_a": normal(6, 2), "w_lora_b": normal(2, 2, 5)},
        [Pair("w_lora_a", "w_lora_b", batch_axes=0)],
        ["dR,Rnh->dnh"],
    ),
    "square in every way": (
        {"lora_a": normal(2, 2), "lora_b": normal(2, 2)},
        [Pair("lora_a", "lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "more ranks than outputs": (
        {"head": {"lora_a": normal(9, 2), "lora_b": normal(2, 1)}},
        [Pair("head/lora_a", "head/lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "gemma": (
        {"q_einsum": {"lora": {"a": normal(6, 2), "b": normal(2, 3, 4)}, "w": normal(3, 6, 4)}},
        [Pair("q_einsum/lora/a", "q_einsum/lora/b", batch_axes=0)],
        ["dR,Rnh->dnh"],
    ),
    "flax's flat dict": (
        {("up", "lora_a"): normal(6, 2), ("up", "lora_b"): normal(2, 12), ("up", "kernel"): normal(6, 12)},
        [Pair("up/lora_a", "up/lora_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "Keras's paths": (
        {"dense/lora_kernel_a": normal(6, 2), "dense/lora_kernel_b": normal(2, 12), "dense/bias": normal(12)},
        [Pair("dense/lora_kernel_a", "dense/lora_kernel_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "Keras's embedding": (
        {"e/lora_embeddings_a": normal(9, 2), "e/lora_embeddings_b": normal(2, 6)},
        [Pair("e/lora_embeddings_a", "e/lora_embeddings_b", batch_axes=0)],
        ["ir,ro->io"],
    ),
    "layers in the place of factors": (
        {"q": {"lora_a": {"weight": normal(2, 6)}, "lora_b": {"weight": normal(6, 2), "bias": normal(6)}}},
        [Pair("q/lora_a/weight", "q/lora_b/weight", True, 0)],
        ["ri,or->io"],
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
    keys = path.split("/")
    if path in tree or tuple(keys) in tree:  # a flat dict
        return np.asarray(tree[path if path in tree else tuple(keys)], float)
    for key in keys:
        tree = tree[int(key) if key.isdigit() else key]
    return np.asarray(tree[...], float)


def filled(tree):
    """The tree with random factors in place of zeros."""
    return jax.tree.map(lambda x: x if jnp.any(x) else normal(*x.shape), tree)


def seen(pairs):
    """Pairs as these tests write them: paths as text, PEFT's layout or not."""
    return [(path_text(p.path_a), path_text(p.path_b), bool(p.transposed), p.batch_axes) for p in pairs]


def balanced(tree, pairs):
    return write_pairs(tree, pairs, [balance(*factors, gauge="symmetric") for factors in read_pairs(tree, pairs)])


@conventions
def test_finds_the_pairs_and_their_layout(tree, expected, contractions):
    assert seen(find_pairs(tree)) == seen(expected)
    assert seen(find_pairs(jax.eval_shape(lambda: tree))) == seen(expected)
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
        axes = range(pair.batch_axes) if isinstance(pair.batch_axes, int) else pair.batch_axes
        assert a.shape[0] == b.shape[0] == np.prod([leaf(tree, pair.path_a).shape[i] for i in axes])
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
    assert sorted(seen(find_pairs(view(qwix_model)))) == seen(QWIX_NNX_PAIRS)


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
    assert seen(pairs) == [(f"params/{n}/kernel_lora_a", f"params/{n}/kernel_lora_b", False, 0) for n in names]
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
        ([Pair("stack/u", "stack/v", batch_axes=1)], [Pair("stack/u", "stack/v", batch_axes=1)]),
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
    assert seen(found) == seen(expected)
    for pair, (a, b) in zip(expected, read_pairs(NAMED, found), strict=True):
        leaf_a, leaf_b = leaf(NAMED, pair.path_a), leaf(NAMED, pair.path_b)
        if pair.transposed:
            dense, product = leaf_a.T @ leaf_b.T, a @ b
        elif pair.batch_axes:
            dense, product = leaf_a @ leaf_b, a @ b
        else:  # one pair, the axes beside the rank flattened
            dense, product = np.tensordot(leaf_a, leaf_b, 1), a @ b
        np.testing.assert_allclose(np.ravel(product), np.ravel(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [list, tuple])
def test_paths_that_read_alike_are_different_paths(form):
    """A key may hold the `/` that joins keys in messages."""
    pair = {"lora_a": normal(6, 2), "lora_b": normal(2, 5)}
    other = jax.tree.map(lambda x: x + 1, pair)
    params = form([{"x": {"y": pair}, "x/y": other}])
    found = find_pairs(params)
    assert [p.path_a for p in found] == [(0, "x", "y", "lora_a"), (0, "x/y", "lora_a")]
    new = balance_tree(params)
    for old_pair, new_pair in zip((pair, other), (new[0]["x"]["y"], new[0]["x/y"]), strict=True):
        assert gap(new_pair["lora_a"], new_pair["lora_b"]).max() < 1e-5
        np.testing.assert_allclose(
            new_pair["lora_a"] @ new_pair["lora_b"], old_pair["lora_a"] @ old_pair["lora_b"], atol=1e-5
        )
    with pytest.raises(ValueError, match=r"all of .*name it by its tuple of keys"):
        find_pairs(params, [("0/x/y/lora_a", "0/x/y/lora_b")])
    assert find_pairs(params, [(p.path_a, p.path_b) for p in found]) == found


class Variable:
    """As Keras's: no pytree, but it tells its path and can be made an array."""

    def __init__(self, path, value):
        self.path, self.value, self.shape, self.dtype = path, value, value.shape, "float32"

    def __jax_array__(self):
        return self.value


def test_a_list_of_variables_is_found_by_their_names_and_its_values_by_the_same_pairs():
    variables = [
        Variable("d/bias", normal(5)),
        Variable("d/lora_kernel_a", normal(6, 2)),
        Variable("d/lora_kernel_b", normal(2, 5)),
    ]
    pairs = find_pairs(variables)
    assert seen(pairs) == [("1", "2", False, 0)]
    values = [variable.value for variable in variables]
    for x, y in zip(read_pairs(variables, pairs)[0], read_pairs(values, pairs)[0], strict=True):
        np.testing.assert_array_equal(x, y)
    twice = [*variables, Variable("d/lora_kernel_a", normal(6, 2))]
    with pytest.raises(ValueError, match="two leaves are called d/lora_kernel_a"):
        find_pairs(twice)


def test_a_flat_state_of_flax_is_found_by_its_paths():
    state = nnx.state(nnx.LoRALinear(6, 12, lora_rank=2, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(state)
    (pair,) = find_pairs(flat)
    for x, y in zip(read_pairs(flat, [pair])[0], read_pairs(state, find_pairs(state))[0], strict=True):
        np.testing.assert_array_equal(x, y)


def test_balance_pairs_fits_between_reading_and_writing():
    tree, _, _ = CONVENTIONS["nested PEFT"]
    pairs = find_pairs(tree)
    new = write_pairs(tree, pairs, balance_pairs(read_pairs(tree, pairs)))
    jax.tree.map(np.testing.assert_array_equal, new, balance_tree(tree))
    assert not same_bits(new["q"]["lora_A"]["default"]["weight"], tree["q"]["lora_A"]["default"]["weight"])


# name: (leaves of a pair, what the message says, hints to find_pairs, and the contraction that each means)
AMBIGUOUS = {
    "this layout under PEFT's names": (
        {"lora_A": normal(16, 4), "lora_B": normal(4, 16)},
        ["4 x 4 of rank 16 (transposed=True", "16 x 16 of rank 4 (transposed=False"],
        [({"transposed": False}, "ir,ro->io"), ({"transposed": True}, "ri,or->io")],
    ),
    "PEFT's layout under other names": (
        {"q": {"lora_a": normal(4, 16), "lora_b": normal(16, 4)}},
        ["q/lora_a and q/lora_b", "rank 16 (transposed=False", "rank 4 (transposed=True"],
        [({"transposed": True}, "ri,or->io"), ({"transposed": False}, "ir,ro->io")],
    ),
    "stacked": (
        {"lora_A": normal(3, 16, 4), "lora_B": normal(3, 4, 16)},
        ["3 pairs, 16 x 16 of rank 4 each (transposed=False, batch_axes=1)"],
        [({"transposed": False}, "lir,lro->lio"), ({"transposed": True}, "lri,lor->lio")],
    ),
    "one left factor of several experts": (
        {"lora_a": normal(16, 4), "lora_b": normal(4, 4, 32)},
        ["one pair, 16 x 128 of rank 4", "4 factors B that share one A"],
        [({"batch_axes": 0}, "ir,rno->ino")],
    ),
    "layers scanned along axis 1": (
        {"lora_a": normal(16, 3, 4), "lora_b": normal(4, 3, 32)},
        ["one pair, 48 x 96", "3 pairs, 16 x 32 of rank 4 each (transposed=False, batch_axes=(1,))"],
        [({"batch_axes": (1,)}, "ilr,rlo->ilo"), ({"batch_axes": 0}, "ilr,rmo->ilmo")],
    ),
    "as many layers or heads as ranks": (
        {"w_lora_a": normal(4, 16, 4), "w_lora_b": normal(4, 4, 32)},
        ["4 pairs, 16 x 32 of rank 4 each (transposed=False, batch_axes=1)", "one pair, 64 x 128"],
        [({"batch_axes": 1}, "lir,lro->lio"), ({"batch_axes": 0}, "hir,rno->hino")],
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_can_be_read_in_several_ways_is_refused_until_it_is_said(case):
    tree, fragments, choices = AMBIGUOUS[case]
    with pytest.raises(ValueError, match="can be read in several ways that give different products") as caught:
        balora_project().init(tree)
    assert all(fragment in str(caught.value) for fragment in [*fragments, "pairs=[Pair("]), caught.value
    for hints, contraction in choices:
        (found,) = find_pairs(tree, **hints)
        (named,) = find_pairs(tree, [Pair(found.path_a, found.path_b, **hints)], **hints)
        assert seen([named]) == seen([found])
        new = balance_tree(tree, pairs=lambda tree, hints=hints: find_pairs(tree, **hints))
        old, new = ([np.asarray(x, float) for x in jax.tree.leaves(x)] for x in (tree, new))
        np.testing.assert_allclose(np.einsum(contraction, *new), np.einsum(contraction, *old), atol=1e-5)
        assert not np.allclose(new[0], old[0], atol=1e-3)


FORMS = st.sampled_from(["plain", "PEFT", "qwix", "stacked", "scanned", "convolution"])


@given(st.lists(st.tuples(FORMS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_pair_that_is_accepted_is_read_as_it_was_made(made):
    """Whatever the sizes: the product that a pair is read as is the one that it stands for, or it is refused."""
    tree, products = {}, {}
    rng = np.random.default_rng(0)
    for i, (form, a, b, r) in enumerate(made):
        shape_a, shape_b, names, contraction = {
            "plain": ((a, r), (r, b), "lora_a lora_b", "ir,ro->io"),
            "PEFT": ((r, a), (b, r), "lora_A lora_B", "ri,or->io"),
            "qwix": ((a, r), (r, b, 3), "w_lora_a w_lora_b", "ir,rno->ino"),
            "stacked": ((3, a, r), (3, r, b), "lora_a lora_b", "lir,lro->lio"),
            "scanned": ((a, 3, r), (r, 3, b), "lora_a lora_b", "ilr,rlo->lio"),
            "convolution": ((2, 2, a, r), (1, 1, r, b), "lora_a lora_b", "hwir,xyro->hwio"),
        }[form]
        pair = dict(zip(names.split(), (rng.standard_normal(shape) for shape in (shape_a, shape_b)), strict=True))
        tree[f"{i}"], products[f"{i}", names.split()[0]] = pair, np.einsum(contraction, *pair.values())
    try:
        pairs = find_pairs(tree)
    except ValueError as error:
        if "can be read in several ways" not in str(error):
            raise
        return
    for pair, (a, b) in zip(pairs, read_pairs(tree, pairs), strict=True):
        np.testing.assert_allclose(np.ravel(a @ b), np.ravel(products[pair.path_a]), atol=1e-12)


def test_pairs_come_in_the_order_of_their_left_factors():
    tree = OrderedDict((name, jnp.ones((3, 3, 3))) for name in ("y.lora_b", "x.lora_a", "x.lora_b", "y.lora_a"))
    assert [pair.path_a for pair in find_pairs(tree, transposed=False, batch_axes=1)] == [("x.lora_a",), ("y.lora_a",)]


A, B, C = jnp.ones((6, 2)), jnp.ones((2, 5)), jnp.ones((4, 4))
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
    "batch_axes": ({"u": A, "v": B}, [Pair("u", "v", batch_axes=1)], ValueError, ["u", "v", "batch_axes=1"]),
    "frozen A": ({"m": {"lora_b": B}}, None, ValueError, ["m/lora_b", "moves both factors"]),
    "other names": ({"m": {"down": A, "scale": A[0], "up": B}}, None, ValueError, ["pairs=[('m/down', 'm/up')]"]),
    "a list": ([A, A[0], B], None, ValueError, ["pairs=[('0', '2')]"]),
    "nearly a path": ({"mlp": {"u": A, "v": B}}, [("mlp/u", "ml/v")], ValueError, ["did you mean 'mlp/v'?"]),
    "other layout by name": ({"lora_A": A, "lora_B": B}, None, ValueError, ["transposed=False they would be"]),
    "square in every way": ({"u": C, "v": C + 1}, [("u", "v")], ValueError, ["transposed=True", "transposed=False"]),
    "named ranks differ": ({"u": A, "v": A}, [("u", "v")], ValueError, ["u", "v", "(6, 2)"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_path(case):
    tree, pairs, error, fragments = ERRORS[case]
    with pytest.raises(error) as caught:
        find_pairs(tree, pairs)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
