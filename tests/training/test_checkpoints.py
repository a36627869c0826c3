"""A checkpoint gives back every bit that it was given, or says that it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balora_jax.training import RunError
from balora_jax.training.checkpoints import Checkpoints, _checksum


def state(seed=0):
    """Arrays of the dtypes of a run, with numbers that a comparison of values would miss."""
    values = np.random.default_rng(seed).standard_normal((3, 4))
    return {
        "float32": jnp.float32(values).at[0, :3].set(jnp.array([jnp.nan, -0.0, 1e-45])),
        "bfloat16": jnp.bfloat16(values),
        "step": jnp.int32(seed),
        "flags": jnp.asarray(values > 0),
        "key": jax.random.split(jax.random.key(seed), 2),
        "empty": (),
    }


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "lora", keep=2)
    assert checkpoints.latest_step() is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return tmp_path / "lora"


def test_every_bit_comes_back(saved):
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.latest_step() == 3
    for step in (2, 3):
        found = checkpoints.restore(step, state())
        assert jax.tree.map(bits, found) == jax.tree.map(bits, state(step))
    checkpoints.close()


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "lora", keep=1)
    assert checkpoints.wait() is None
    given = {"x": jnp.arange(1_000_000.0)}
    checkpoints.save(1, given)
    jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(given))
    assert checkpoints.wait() == 1
    assert checkpoints.wait() is None
    found = checkpoints.restore(1, {"x": jnp.zeros(1_000_000)})
    np.testing.assert_array_equal(found["x"], np.arange(1_000_000.0))
    checkpoints.close()


def test_what_could_not_be_written_is_told_when_the_folder_is_closed(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "lora", keep=1)
    checkpoints.save(1, {"x": jnp.zeros(3)})

    def fails(manager):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._manager), "wait_until_finished", fails)
        with pytest.raises(RunError, match=r"cannot write the checkpoint .*lora/1 \(.*No space left on device\)"):
            checkpoints.close()


@pytest.mark.parametrize("change", ["one number", "two that change places"])
def test_checksums_tell_states_apart(change):
    before = jnp.arange(12.0).reshape(3, 4)
    after = before.at[1, 2].add(1e-6) if change == "one number" else before[jnp.array([0, 2, 1])]
    assert _checksum({"x": before}) != _checksum({"x": after})
    assert _checksum({"x": before}) == _checksum({"x": jnp.array(before)})


def test_the_latest_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_reading_alone_changes_nothing(saved):
    (saved / "4.orbax-checkpoint-tmp").mkdir()
    before = sorted(saved.rglob("*"))
    checkpoints = Checkpoints(saved, keep=None)
    checkpoints.restore(checkpoints.latest_step(), state())
    checkpoints.close()
    assert sorted(saved.rglob("*")) == before


@pytest.mark.parametrize("damage", ["another checksum", "no metadata", "no arrays", "no checkpoint"])
def test_a_damaged_checkpoint_is_named(damage, saved):
    meta = saved / "3" / "meta" / "metadata"
    if damage == "another checksum":
        text = meta.read_text()
        meta.write_text(text.replace('"checksum": [', '"checksum": [1'))
        assert meta.read_text() != text
    elif damage == "no metadata":
        meta.unlink()
    elif damage == "no arrays":
        for file in (saved / "3" / "state").rglob("*"):
            if file.is_file():
                file.unlink()
    step = 7 if damage == "no checkpoint" else 3
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(RunError, match=rf"the checkpoint .*lora/{step} is broken .*; delete it to go on from the one"):
        checkpoints.restore(step, state())
    checkpoints.restore(2, state())
    checkpoints.close()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "lora").write_text("")
    with pytest.raises(RunError, match="lora must be a folder, but it is a file"):
        Checkpoints(tmp_path / "lora", keep=2)


def test_a_state_of_another_structure_is_refused(saved):
    checkpoints = Checkpoints(saved, keep=2)
    other = {name: leaf for name, leaf in state().items() if name != "float32"}
    with pytest.raises(RunError, match=r"lora/3 is broken"):
        checkpoints.restore(3, other)
    checkpoints.close()
