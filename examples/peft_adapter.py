"""Inspects, balances and writes back a PEFT adapter: `python examples/peft_adapter.py [ADAPTER OUT]`.

Neither torch, PEFT nor the base model is needed. Without arguments an adapter is made first. The commands
`balora-jax inspect` and `balora-jax balance` do the same.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from balora_jax import balance_pairs, read_pairs, write_pairs
from balora_jax.adapters import PeftModule, read_peft, write_peft
from balora_jax.adapters.diagnosis import diagnose_adapter
from balora_jax.adapters.peft import from_modules


def made(folder: Path) -> Path:
    """Writes an adapter as training leaves it: its B much smaller than its A."""
    rng = np.random.default_rng(0)

    def low_rank(rows, columns, rank=8):
        a, b = rng.standard_normal((rows, rank)), 0.05 * rng.standard_normal((rank, columns))
        return PeftModule((a / rows**0.5).astype(np.float32), b.astype(np.float32), scale=2.0)

    modules = {
        f"model.layers.{i}.mlp.{name}": low_rank(*shape)
        for i in range(2)
        for name, shape in (("up_proj", (64, 172)), ("down_proj", (172, 64)))
    }
    write_peft(from_modules(modules), folder)
    return folder


def show(title: str, diagnoses) -> None:
    """Prints the worst balance and conditioning."""
    gap = max(d.gap for d in diagnoses.values())
    number = max(d.condition_number for d in diagnoses.values())
    least = max(d.least_condition_number for d in diagnoses.values())
    print(f"{title}: {len(diagnoses)} pairs, worst gap {gap:.0e}, condition number {number:.1f} (least {least:.1f})")


if len(sys.argv) == 3:
    source, out = map(Path, sys.argv[1:])
else:
    folder = Path(tempfile.mkdtemp())
    source, out = made(folder / "adapter"), folder / "balanced"

adapter = read_peft(source)
before = diagnose_adapter(adapter)
show("before", before)

pairs = list(adapter.pairs().values())
factors = read_pairs(adapter.tensors, pairs)  # in one layout, whatever that of the file
balanced = balance_pairs(factors)
tensors = write_pairs(adapter.tensors, pairs, balanced)
write_peft(replace(adapter, tensors={name: np.asarray(x) for name, x in tensors.items()}), out)

after = diagnose_adapter(read_peft(out))
show("after", after)
for name in before:
    np.testing.assert_allclose(after[name].singular_values, before[name].singular_values, rtol=1e-5)
print(f"the products are the same; written to {out}")
