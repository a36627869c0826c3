"""What is read from compiled programs is what they do."""

import jax
import jax.numpy as jnp
import pytest

from balora_jax.in_place import update_if
from balora_jax.training.hlo import Program
from balora_jax.training.work import work

HEAD = "HloModule step, is_scheduled=true\n\n"


def read(text, **options):
    return work(Program(HEAD + text), **{"loops": 3, "node": 8} | options)


def entry(*lines):
    """A program of some lines, the last of which is its result."""
    return "ENTRY %main (p: f32[4,8]) -> f32[4,8] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


P, Q = "%p = f32[4,8]{1,0} parameter(0)", "%q = f32[8,6]{1,0} parameter(1)"
FORMS = {
    "dot": (
        "%d = f32[4,6]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        ("float32", 2 * 4 * 6 * 8),
    ),
    "in full": (
        "%d = f32[4,6]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
        "operand_precision={highest,highest}",
        ("highest", 2 * 4 * 6 * 8),
    ),
    "GPU": (
        '%d = (f32[4,6]{1,0}, s8[33554432]{0}) custom-call(%p, %q), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]},'
        '"operand_precision":["HIGHEST","HIGHEST"]}',
        ("highest", 2 * 4 * 6 * 8),
    ),
    "TPU": (
        "%d = f32[4,6]{1,0:T(8,128)} convolution(%p, %q), dim_labels=bf_io->bf",
        ("float32", 2 * 4 * 6 * 8),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_products_and_their_arithmetic(form):
    line, expected = FORMS[form]
    found = read(entry(P, Q, line))
    assert dict([expected]) == found.products
    assert found.bytes == 4 * (4 * 8 + 8 * 6 + 4 * 6)
    assert found.kernels == 1
    assert not found.unseen


def test_stacked_products_of_tpus():
    """A batch of matrices is written as a convolution over a widened axis, most of whose places hold nothing."""
    found = read(
        entry(
            "%p = f32[3,4,8]{2,1,0} parameter(0)",
            "%q = f32[3,6,8]{2,1,0} parameter(1)",
            "%d = f32[3,4,6]{2,1,0} convolution(%p, %q), window={size=3 stride=2 lhs_dilate=3}, "
            "dim_labels=0bf_0oi->0bf",
        )
    )
    assert found.products == {"float32": 3 * 2 * 4 * 6 * 8}


def test_what_lies_on_the_chip_is_no_traffic():
    found = read(entry(P, "%c = f32[4,8]{1,0:T(8,128)S(1)} copy(%p)", "%n = f32[4,8]{1,0:T(8,128)S(1)} negate(%c)"))
    assert found.bytes == 4 * 4 * 8


GROUPS = {
    "listed": ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, False),
    "counted": ("replica_groups=[2,4]<=[8]", 4, False),
    "named": ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4, False),
    "named across": ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2, True),
    "named in order": ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 2, False),
    "named in a list": ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", 2, True),
    "part of an axis": ("replica_groups=mesh['a'=8] {'a':(2)4}", 4, False),
    "first part of an axis": ("replica_groups=mesh['a'=8] {'a':(1)4}", 4, True),
    "across": ("replica_groups=[4,2]<=[2,4]T(1,0)", 2, True),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all-reduce", lambda n: 2 * (n - 1) / n),
        ("all-reduce-start", lambda n: 2 * (n - 1) / n),
        ("all-gather", lambda n: n - 1),
        ("reduce-scatter", lambda n: (n - 1) / n),
    ],
)
def test_bytes_between_devices(kind, share, groups):
    text, n, far = GROUPS[groups]
    found = read(entry(P, f"%r = f32[4,8]{{1,0}} {kind}(%p), {text}, to_apply=%add"), node=4)
    assert found.sent == {(kind.removesuffix("-start"), far): 4 * 4 * 8 * share(n)}


def test_permutations_between_nodes():
    text = "%r = f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    assert read(entry(P, text), node=4).sent == {("collective-permute", False): 128}
    assert read(entry(P, text), node=2).sent == {("collective-permute", True): 128}


def test_loops_of_a_compiled_program():
    """Loops count as often as they run, or as is said where the data decide; slices are not all of the array."""

    def step(x, stack):
        def layer(x, w):
            with jax.named_scope("inside"):
                return x @ w, None

        x, _ = jax.lax.scan(layer, x, stack)
        x = jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ stack[0], x)
        return update_if(x.sum() > 0, lambda x: x @ stack[1], x)

    x, stack = jnp.ones((4, 64)), jnp.ones((1000, 64, 64))
    found = Program(jax.jit(step).lower(x, stack).compile().as_text())
    product = 2 * 4 * 64 * 64
    for loops in (0, 5):
        done = work(found, loops=loops, node=1)
        assert done.products == {"float32": (1000 + loops) * product}
        assert stack.nbytes <= done.bytes < 4 * stack.nbytes  # and not a thousand times
    assert work(found, loops=5, node=1, within="inside").products == {"float32": 1000 * product}


def test_functions_that_the_compiler_does_not_see_into():
    line = '%d = (f32[4,6]{1,0}, s32[]) custom-call(%p), custom_call_target="cusolver_gesvdj_ffi"'
    assert read(entry(P, line)).unseen == {"cusolver_gesvdj_ffi": 1}


def test_what_is_not_such_a_program_is_refused():
    with pytest.raises(ValueError, match="the compiled program must have"):
        read(entry(P, Q, "%d = f32[4,6]{1,0} dot(%p, %q)"))
