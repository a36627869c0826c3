"""What is estimated from config.json alone is what the loaded model takes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from processes import run_alone

from balora_jax.adapters import iter_adapters
from balora_jax.cli import main
from balora_jax.models.weights import load_decoder
from balora_jax.training import ConfigError, targets
from balora_jax.training.estimate import estimate
from balora_jax.training.estimate_tables import seconds
from balora_jax.training.loading import load_shapes
from balora_jax.training.program import Program


@pytest.fixture(scope="module")
def bare_folder(model_folder, tmp_path_factory):
    """The tiny model without its weights."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    return folder


def at(config, folder, **changes):
    """A config whose model is in a folder."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder), **changes))


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_it_is_what_the_loaded_model_takes(members, model_folder, bare_folder):
    configs = [members(method="dora", seed=seed, adapter__rank=2) for seed in (0, 1)]
    found = estimate([at(config, bare_folder) for config in configs])
    program = Program(configs[0], load_decoder(model_folder))
    state = program.initial_state(configs)
    batches = {name: jnp.ones((2, 1, 2, 48), jnp.int32) for name in ("tokens", "positions", "segment_ids")}
    batches["loss_mask"] = jnp.ones((2, 1, 2, 48), bool)
    analysis = program.step.lower(state, program.base, batches).compile().memory_analysis()
    weights = jax.tree.leaves(program.base)
    assert found.base == (sum(leaf.size for leaf in weights), bytes_of(weights))
    assert found.trained[1] == bytes_of(state.adapters) / 2 == 4 * found.trained[0]
    assert found.opt_state[1] == bytes_of(state.opt_state) / 2
    assert found.members == 2
    one = program.member_model(jax.tree.map(lambda leaf: leaf[0], state), program.base)
    for path, adapter in iter_adapters(one):
        assert found.adapters[path] == (adapter.lora_a.shape, adapter.lora_b.shape, adapter.magnitude.shape)
    assert found.step.arguments == pytest.approx(analysis.argument_size_in_bytes, rel=0.01)
    assert found.step.temporaries == pytest.approx(analysis.temp_size_in_bytes, rel=0.1)
    assert found.narrow_step is None


def test_a_large_vocabulary_and_a_bfloat16_base(members, bare_folder, tmp_path):
    """No step on 8 x 1024 tokens holds all their logits, and only CPUs widen the base."""
    content = json.loads((bare_folder / "config.json").read_text())
    content |= {"vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = members(training__batch_size=8, data__length=1024)
    found = estimate([at(config, tmp_path, dtype="bfloat16", param_dtype="bfloat16", remat=True)])
    assert found.step.temporaries < 4 * 8 * 1023 * 151_936 / 2
    assert found.base[1] == 2 * found.base[0]
    if jax.default_backend() == "cpu":
        kernels_in_float32 = 4 * 2 * 3 * 256 * 4096
        assert found.narrow_step.peak < found.step.peak - 0.8 * kernels_in_float32


def test_the_command_prints_it_before_any_weight_is_there(bare_folder, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "from balora_jax.training import *\n"
        f"config = Config(name='dry', model=ModelSettings(path={str(bare_folder)!r}))\n"
        "sweep = {'seed': (0, 1, 2)}\n"
    )
    options = "--method lora_ga --adapter.rank 2 --adapter.targets q_proj o_proj"  # a method that starts from data
    assert main(["estimate", str(file), *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "layers.self_attn.q_proj: (2, 16, 2) + (2, 2, 16)" in printed
    assert "layers.self_attn.o_proj" in printed
    assert re.search(r"┃ +lora_ga ┃", printed)
    assert re.search(r"runs together +│ +3 │", printed)
    assert "trained parameters" in printed
    assert "256" in printed  # 2 targets of 2 layers, each (16 + 16) x 2
    assert main(["estimate", str(file), "--output", "somewhere"]) == 2
    assert main(["estimate"]) == 2
    assert "estimate needs a config file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"adapter__targets": ("k_prj",)}, "did you mean 'k_proj'"), ({"adapter__rank": 99}, "rank must be from 1 to")],
)
def test_what_cannot_be_run_cannot_be_estimated(changes, message, members):
    with pytest.raises(ConfigError, match=message):
        estimate([members(**changes)])


def test_a_missing_model_is_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: .*absent must be a model folder"):
        estimate([at(config, tmp_path / "absent")])


@pytest.fixture
def pretended(monkeypatch):
    """An accelerator for which the compiler at hand does."""
    chip = dataclasses.replace(targets.CHIPS["h100"], platform="cpu", memory=2**20)
    monkeypatch.setattr(targets, "CHIPS", {"pretended": chip})
    monkeypatch.setattr(targets.Target, "devices", lambda self: jax.devices())
    return chip


def test_time_of_a_step_on_a_target(members, bare_folder, pretended):
    config = at(members(method="balora", adapter__rank=2), bare_folder)
    found = estimate([config], targets.parse_target("pretended:1"))
    rows, length = config.training.batch_size, config.data.length
    shape = load_shapes(config.model)
    layers = 2 * rows * length * sum(leaf.size for leaf in jax.tree.leaves(shape.layers))
    head = 2 * rows * length * shape.embed_tokens.embedding.size
    scores = 4 * rows * length**2 * shape.config.num_hidden_layers * shape.config.num_attention_heads
    attention = scores * shape.config.head_dim
    assert found.tokens == rows * length
    # forward and back at the least; at the most with a second forward pass, and as much for the adapters
    assert 2 * layers < found.whole.work.products["float32"] < 2 * 3 * layers + 4 * (head + attention)
    assert found.whole.compute >= found.whole.work.products["float32"] / pretended.peak["float32"]
    assert found.whole.work.bytes > found.base[1] + found.trained[1] + found.opt_state[1]
    assert 0 < found.projection.slowest < found.whole.slowest
    assert found.held["base"] == found.base[1]
    assert found.held["optimizer state"] == found.opt_state[1]
    assert sum(found.held.values()) == pytest.approx(found.step.arguments, rel=0.02)
    plain = estimate([at(members(method="lora", adapter__rank=2), bare_folder)], targets.parse_target("pretended:1"))
    assert plain.projection.slowest == 0


def test_search_tries_the_meshes_and_shows_the_fastest_first(bare_folder):
    """On two devices; three rows cannot be cut in two, so that only the weights can be."""
    printed = run_alone(
        f"""
        import dataclasses, jax
        from balora_jax.training import *
        from balora_jax.training import targets
        from balora_jax.training.estimate import estimate, search
        from balora_jax.training.targets import CHIPS, Target, parse_target

        targets.CHIPS = {{"pretended": dataclasses.replace(CHIPS["h100"], platform="cpu", launch=0)}}
        Target.devices = lambda self: jax.devices()[:self.size]
        config = Config(
            name="dry", model=ModelSettings(path={str(bare_folder)!r}), adapter=AdapterSettings(rank=2),
            data=DataSettings(length=48), training=TrainingSettings(batch_size=4),
        )
        found = search([config], parse_target("pretended:2"))
        assert set(found) == {{(2, 1, 1), (1, 2, 1), (1, 1, 2)}}, found.keys()
        slowest = [one.whole.slowest for one in found.values()]
        assert slowest == sorted(slowest)
        whole = estimate([config], parse_target("pretended:1"))
        for mesh, one in found.items():
            assert one.mesh == mesh and one.tokens == whole.tokens
            sent = sum(one.whole.work.sent.values())
            assert sent > 0 and abs(one.whole.network * CHIPS["h100"].link / sent - 1) < 1e-9
            assert 0.4 < sum(one.whole.work.products.values()) / sum(whole.whole.work.products.values()) < 0.8
            assert (one.held["base"] < 0.9 * whole.held["base"]) == (mesh != (2, 1, 1))
        config = dataclasses.replace(config, training=TrainingSettings(batch_size=3))
        print(*search([config], parse_target("pretended:2")))
        """,
        flags="--xla_force_host_platform_device_count=2",
    )
    assert "(1, 1, 2)" in printed
    assert "(2, 1, 1)" not in printed


def test_the_command_tells_what_does_not_fit(bare_folder, tmp_path, capsys, pretended):
    file = tmp_path / "config.py"
    file.write_text(
        "from balora_jax.training import *\n"
        f"config = Config(name='dry', model=ModelSettings(path={str(bare_folder)!r}))\n"
    )
    options = "--target pretended:1 --adapter.rank 2 --data.length 48"
    assert main(["estimate", str(file), *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "a step on pretended:1, for each device" in printed
    assert re.search(r"peak, of 1 MiB +│ +\d+ MiB, does not fit", printed)
    for row in ("traffic with the memory", "time of launches", "bound by", "tokens per second", "balancing, of a step"):
        assert row in printed
    assert "reckoned, not measured" in printed
    assert main(["estimate", str(file), "--search"]) == 2
    assert "--search needs accelerators" in capsys.readouterr().err
    assert main(["estimate", str(file), "--target"]) == 2
    assert main(["estimate", str(file), "--target", "h101:8"]) == 2
    assert "--target must be cpu or one of" in capsys.readouterr().err


def test_times_as_people_write_them():
    assert list(map(seconds, (2.0, 0.0314, 5e-6, 0.0))) == ["2 s", "31.4 ms", "5 us", "0 us"]
