"""Results have the numbers of one device and the shardings that are asked for."""

import numpy as np
from processes import run_alone

from balora_jax.sharding import entries_at, rows_at, sharded_like

TABLE, INDICES = np.arange(24.0).reshape(8, 3), np.array([[1, 7], [0, 1]])


def test_without_a_mesh():
    np.testing.assert_array_equal(rows_at(TABLE, INDICES), TABLE[INDICES])
    np.testing.assert_array_equal(entries_at(TABLE, np.arange(8) % 3), TABLE[range(8), np.arange(8) % 3])
    assert sharded_like(TABLE, lambda x, y: x + y, 1, 2) == 3


def test_under_a_mesh_with_explicit_axes():
    run_alone(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from balora_jax.sharding import entries_at, rows_at, sharded_like

        mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=2 * (AxisType.Explicit,))
        table, indices = np.arange(32.0).reshape(8, 4), np.array([[1, 7], [0, 1]])

        def put(x, *spec):
            return jax.device_put(x, NamedSharding(mesh, P(*spec)))

        def check(found, expected, *spec):
            np.testing.assert_array_equal(found, expected)
            assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), found.ndim), found.sharding

        with jax.set_mesh(mesh):
            for spec in (("y",), (None, "y"), ()):
                check(jax.jit(rows_at)(put(table, *spec), put(indices, "x")), table[indices], "x")
            columns = np.arange(8) % 4
            for column_axis in ("y", None):
                found = jax.jit(entries_at)(put(table, "x", column_axis), put(columns, "x"))
                check(found, table[range(8), columns], "x")
            like = {"a": put(table, "x"), "b": put(table, None, "y")}

            def function(like):
                return jax.tree.map(lambda x: x.T.T + 1, like), sum(x.sum() for x in like.values())

            found, total = jax.jit(lambda like: sharded_like((like,), function, like, replicated=1))(like)
            check(found["a"], table + 1, "x")
            check(found["b"], table + 1, None, "y")
            check(total, 2 * table.sum())
        """,
        flags="--xla_force_host_platform_device_count=4",
    )
