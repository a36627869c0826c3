import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import OPTIMIZED
from decoder_reference import CONFIGS, SIZES, random_decoder, reference_logits
from flax import nnx
from processes import run_alone

from balora_jax.adapters import add_adapters
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.generation import generate

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
VOCAB = SIZES["vocab_size"]


def text(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


@nnx.jit
def compiled(model, tokens, positions, segment_ids):
    return model(tokens, positions=positions, segment_ids=segment_ids)


def forward(model, tokens, positions=None, segment_ids=None):
    """The logits of up to 10 x 12 tokens, at that size so that one compilation serves all tests of a config."""
    rows, length = tokens.shape
    if positions is None:
        positions = np.broadcast_to(np.arange(length), tokens.shape)
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    filled = [np.pad(x, ((0, 10 - rows), (0, 12 - length))) for x in (tokens, positions, segment_ids)]
    return np.asarray(compiled(model, *filled))[:rows, :length]


def close(found, expected, tolerance=1e-5):
    """Asserts equality relative to the largest entry."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@each_config
def test_forward_is_the_definition(config):
    model, tokens = random_decoder(config), text(4, 12)
    close(forward(model, tokens), reference_logits(model, tokens))
    positions = np.stack([np.arange(12) + 700, np.arange(12)[::-1] * 3, *text(2, 12, seed=1)])
    segment_ids = np.sort(text(4, 12) % 3)
    expected = reference_logits(model, tokens, positions, segment_ids)
    close(forward(model, tokens, positions, segment_ids), expected)


def test_positions_count_from_zero_and_a_row_is_one_text_by_default():
    model, tokens = random_decoder(CONFIGS["llama3"]), text(2, 6)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert logits.dtype == jnp.float32
    close(logits, reference_logits(model, tokens))


PACKED = [
    # segments and positions of one row of ten tokens
    ([1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [0, 1, 2, 3, 0, 1, 2, 3, 4, 0]),
    ([0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 2, 3, 4, 0, 1, 2]),
    ([7, 7, 7, 7, 7, 7, 7, 7, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]),
]


@each_config
def test_packed_texts_are_the_texts_alone(config):
    model, tokens = random_decoder(config), text(len(PACKED), 10)
    segment_ids, positions = (np.array(column) for column in zip(*PACKED, strict=True))
    packed = forward(model, tokens, positions, segment_ids)
    for row in range(len(PACKED)):
        for segment in set(segment_ids[row]) - {0}:
            where = segment_ids[row] == segment
            close(packed[row, where], forward(model, tokens[row : row + 1, where])[0])


@each_config
def test_later_tokens_change_nothing_before_them(config):
    model, tokens = random_decoder(config), text(1, 9)
    rows = np.repeat(tokens, 10, axis=0)
    for place in range(9):
        rows[place, place] = (rows[place, place] + 1) % VOCAB
    logits = forward(model, rows)
    changed = np.abs(logits[:9] - logits[9]).max(-1) > 0
    np.testing.assert_array_equal(changed, np.triu(np.ones((9, 9), bool)))


def continuation(model, prompt, new_tokens, eos_id):
    """Greedy generation without a cache: the whole text again for each token."""
    row, length = np.zeros((1, 12), int), len(prompt)
    row[0, :length] = prompt
    for place in range(length, length + new_tokens):
        row[0, place] = np.argmax(forward(model, row)[0, place - 1])
        if row[0, place] == eos_id:
            row[0, place:] = eos_id
            break
    return row[0, length : length + new_tokens]


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2"])
def test_generation_from_a_cache_is_generation_without(name):
    model, lengths = random_decoder(CONFIGS[name]), (3, 6, 1)
    prompts, segment_ids = text(len(lengths), 6), np.zeros((len(lengths), 6), int)
    for row, length in enumerate(lengths):
        segment_ids[row, 6 - length :] = 1

    def expected(eos_id):
        return np.stack([continuation(model, p[6 - n :], 6, eos_id) for p, n in zip(prompts, lengths, strict=True)])

    @nnx.jit
    def found(model, eos_id):
        return generate(model, prompts, segment_ids, new_tokens=6, eos_id=eos_id)

    endless = expected(-1)
    np.testing.assert_array_equal(found(model, -1), endless)
    end = endless[1, 3]  # now let this token end a text
    stopped = expected(end)
    assert (stopped[1, 3:] == end).all()
    np.testing.assert_array_equal(found(model, end), stopped)


@nnx.jit
def extend(model, tokens, cache):
    hidden, cache = model.hidden_states(tokens, cache=cache)
    return hidden, model.logits(hidden), cache


def test_cache_takes_a_text_in_pieces():
    model, tokens = random_decoder(CONFIGS["qwen3"]), text(2, 9)
    cache, pieces = model.empty_cache(2, 12), []
    for piece in np.split(tokens, [4, 5], axis=1):
        _, logits, cache = extend(model, piece, cache)
        pieces.append(logits)
    close(np.concatenate(pieces, axis=1), forward(model, tokens))
    assert int(cache.length) == 9
    np.testing.assert_array_equal(cache.segment_ids, np.broadcast_to(np.arange(12) < 9, (2, 12)))


def with_layers(layers, **changes):
    return dataclasses.replace(CONFIGS["llama3"], num_hidden_layers=layers, **changes)


def loss_of(model, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()


def gradient(config, tokens):
    """The traced loss and gradient of a decoder, and what they are functions of."""
    graph, params = nnx.split(random_decoder(config))
    return jax.jit(jax.value_and_grad(lambda params: loss_of(nnx.merge(graph, params), tokens))).trace(params), params


def test_rematerialisation_changes_no_number():
    outcomes, policies = [], []
    for remat in (False, True):
        traced, params = gradient(with_layers(2, remat=remat), text(2, 9))
        policies.append("nothing_saveable" in str(traced.jaxpr))
        outcomes.append(traced.lower().compile()(params))
    assert policies == [False, True]
    (loss, grads), (again, again_grads) = outcomes
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for (path, grad), (_, other) in zip(nnx.to_flat_state(grads), nnx.to_flat_state(again_grads), strict=True):
        assert np.asarray(grad[...]).any(), path
        np.testing.assert_allclose(other[...], grad[...], rtol=1e-4, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("remat", [False, True])
def test_what_the_backward_pass_keeps_of_a_block(remat):
    """Widths of what is kept per token: the input of a block and the outputs of its products that adapters need."""
    config = with_layers(3, remat=remat)
    model = random_decoder(config)
    add_adapters(model, targets=["gate_proj", "up_proj", "down_proj"], rank=2, rngs=nnx.Rngs(0))
    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapters):
        return loss_of(nnx.merge(graph, adapters, rest, copy=True), text(11, 13))

    kept = jax.tree.leaves(jax.eval_shape(lambda adapters: jax.vjp(loss, adapters)[1], adapters))
    widths = [x.size / (3 * 11 * 13) for x in kept if x.ndim > 1 and x.shape[0] == 3 and x.size % (11 * 13) == 0]
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    assert sorted(widths) == (
        [hidden] if remat else sorted([hidden, queries, keys, keys, hidden, inner, inner, 2, 2, 2])
    )


@pytest.mark.parametrize("remat", [False, True])
def test_program_does_not_grow_with_depth(remat):
    sizes = []
    for layers in (2, 12):
        traced, _ = gradient(with_layers(layers, remat=remat), text(1, 5))
        sizes.append(len(traced.lower().as_text().splitlines()))
    assert sizes[0] == sizes[1] > 100


@pytest.mark.parametrize(("name", "param_dtype"), [("llama", "float32"), ("qwen2", "bfloat16")])
def test_bfloat16(name, param_dtype):
    tokens = text(2, 9)
    model = random_decoder(dataclasses.replace(CONFIGS[name], dtype="bfloat16", param_dtype=param_dtype))
    assert {variable.dtype for variable in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(param_dtype)}
    hidden, logits, cache = extend(model, tokens, model.empty_cache(2, 9))
    assert {hidden.dtype, cache.keys.dtype, cache.values.dtype} == {jnp.dtype("bfloat16")}
    alone, _ = nnx.eval_shape(lambda model: model.hidden_states(tokens), model)
    assert (alone.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    close(logits, reference_logits(model, tokens), 0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide num_attention_heads \(4\), got 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads must divide .* got 8"),
        ({"head_dim": 7}, "head_dim must be even .* got 7"),
        *[({name: 0}, f"{name} must .* got 0") for name in SIZES],
        *[({name: 0}, f"{name} must .* got 0") for name in ("num_attention_heads", "num_key_value_heads", "head_dim")],
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["llama"], **changes)


def test_fresh_decoder_has_the_parameters_of_its_config():
    model = nnx.eval_shape(lambda: Decoder(CONFIGS["llama3"], rngs=nnx.Rngs(0)))
    shapes = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model))}
    assert shapes == {
        "embed_tokens/embedding": (29, 16),
        "layers/input_layernorm/scale": (2, 16),
        "layers/mlp/down_proj/kernel": (2, 24, 16),
        "layers/mlp/gate_proj/kernel": (2, 16, 24),
        "layers/mlp/up_proj/kernel": (2, 16, 24),
        "layers/post_attention_layernorm/scale": (2, 16),
        "layers/self_attn/k_proj/kernel": (2, 16, 16),
        "layers/self_attn/o_proj/kernel": (2, 32, 16),
        "layers/self_attn/q_proj/kernel": (2, 16, 32),
        "layers/self_attn/v_proj/kernel": (2, 16, 16),
        "norm/scale": (16,),
    }


def test_fresh_layers_have_weights_of_their_own():
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    model = Decoder(DecoderConfig(**sizes, **heads, num_hidden_layers=2), rngs=nnx.Rngs(0))
    kernels = [v[...] for path, v in nnx.to_flat_state(nnx.state(model.layers)) if path[-1] == "kernel"]
    assert len(np.unique(np.concatenate(kernels), axis=0)) == 7 * 2


def test_rows_and_vocabulary_may_be_sharded():
    """Losses and gradients are those of one device, under meshes with automatic and with explicit axes."""
    run_alone(
        """
        import jax, numpy as np
        from flax import nnx
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from balora_jax.adapters import add_adapters
        from balora_jax.models import Decoder, DecoderConfig
        from balora_jax.training.step import token_losses

        tokens = np.random.default_rng(0).integers(0, 20, (4, 9))
        ones = np.ones_like(tokens)
        batch = {"tokens": tokens, "positions": np.cumsum(ones, 1) - 1, "segment_ids": ones, "loss_mask": ones > 0}
        vocabulary = {"embed_tokens": P("y", None), "lm_head": P(None, "y")}
        sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        for tied in (True, False):
            model = Decoder(DecoderConfig(**sizes, **heads, tie_word_embeddings=tied), rngs=nnx.Rngs(0))
            add_adapters(model, targets=["q_proj", "down_proj"], rank=2, rngs=nnx.Rngs(1))
            graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

            @jax.jit
            def losses_and_gradients(factors, rest, batch):
                def losses(factors):
                    return token_losses(nnx.merge(graph, factors, rest, copy=True), batch)[0]

                value, backward = jax.vjp(losses, factors)
                return value, backward(jax.numpy.cos(value))

            expected = losses_and_gradients(factors, rest, batch)
            for kind in (AxisType.Auto, AxisType.Explicit) if tied else (AxisType.Explicit,):
                mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
                with jax.set_mesh(mesh):
                    for rows, tables in ((P("x"), vocabulary), (P(), vocabulary) if tied else (P("x"), {})):
                        def put(path, x):
                            return jax.device_put(x, NamedSharding(mesh, tables.get(path[0].key, P())))

                        weights = jax.tree_util.tree_map_with_path(put, rest)
                        there = jax.device_put(batch, NamedSharding(mesh, rows))
                        found = losses_and_gradients(jax.device_put(factors, NamedSharding(mesh, P())), weights, there)
                        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                            np.testing.assert_allclose(one, other, atol=1e-5)
        """,
        flags="--xla_force_host_platform_device_count=4",
    )


def memory_of_generation(config, rows, length):
    """The bytes of the parameters of the layers, of the cache, and of what the compiled program needs beside them."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)

    def generated(parameters, prompts):
        model = nnx.merge(graph, parameters, copy=True)
        return generate(model, prompts, jnp.ones_like(prompts), new_tokens=3, eos_id=VOCAB)

    prompts = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    program = jax.jit(generated).lower(parameters, prompts).compile(OPTIMIZED)
    cache = jax.eval_shape(lambda: nnx.merge(graph, parameters).empty_cache(rows, length + 3))
    sizes = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (parameters["layers"], cache))
    return *sizes, program.memory_analysis().temp_size_in_bytes


def test_generation_copies_neither_parameters_nor_cache():
    config = dataclasses.replace(CONFIGS["llama"], hidden_size=64, intermediate_size=1024, num_hidden_layers=8)
    layers, _, temporary = memory_of_generation(config, 1, 4)
    assert temporary < layers / 2
    config = dataclasses.replace(CONFIGS["llama"], num_hidden_layers=64)
    _, cache, temporary = memory_of_generation(config, 64, 16)
    assert cache < temporary < 1.5 * cache
