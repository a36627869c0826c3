"""Evaluation: losses per module, and answers that are what the model would say token by token."""

import dataclasses
import re

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax.data import lengths
from balora_jax.data.batches import encode
from balora_jax.data.scores import same_final_answer
from balora_jax.models.weights import load_decoder
from balora_jax.training.evaluation import (
    EvaluationSet,
    accuracies,
    answer,
    evaluate_loss,
    generate,
    generate_answers,
    what_is_not_finite,
)
from balora_jax.training.loading import load_data
from balora_jax.training.program import Program
from balora_jax.training.step import token_losses


@pytest.fixture(scope="module")
def population(config):
    """Two members with adapters that matter, one of them far from the base, and the evaluation examples."""
    configs = [config, dataclasses.replace(config, seed=1)]
    program = Program(config, load_decoder(config.model.path))
    state = program.initial_state(configs)
    noise = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(jax.tree.leaves(state.adapters))]
    adapters = jax.tree.unflatten(jax.tree.structure(state.adapters), [0.3 * x for x in noise])
    return program, state._replace(adapters=adapters), load_data(config.data)[1]


def member(population, index):
    program, state, _ = population
    return program.member_model(jax.tree.map(lambda x: x[index], state), program.base)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_losses_do_not_depend_on_the_batches(population, batch_size):
    program, state, examples = population
    found = evaluate_loss(program, state, examples, batch_size=batch_size)
    for index in range(2):
        losses, mask = map(np.asarray, token_losses(member(population, index), examples.arrays))
        assert found.total[index] == pytest.approx(losses.sum() / mask.sum(), rel=1e-5)
        for name, loss in found.by_module.items():
            rows = examples.modules == name
            assert loss[index] == pytest.approx(losses[rows].sum() / mask[rows].sum(), rel=1e-5)


def test_examples_are_sorted_by_length_and_results_are_in_their_order(population, monkeypatch):
    """Losses and answers of batches of several lengths, against one batch of the longest."""
    program, state, examples = population
    expected = answer(program, state, examples, batch_size=64)
    monkeypatch.setattr(lengths, "_SHORTEST", 8)
    monkeypatch.setattr(lengths, "_FEWEST", 1)
    said, shapes = [], set()
    evaluate = program.evaluate

    def recorded(state, base, batch):
        shapes.add(batch["tokens"].shape)
        return evaluate(state, base, batch)

    monkeypatch.setattr(program, "evaluate", recorded)
    found = evaluate_loss(program, state, examples, batch_size=2)
    assert {rows for rows, _ in shapes} == {2}
    assert 1 < len(shapes) <= 4
    for index in range(2):
        losses, mask = map(np.asarray, token_losses(member(population, index), examples.arrays))
        assert found.total[index] == pytest.approx(losses.sum() / mask.sum(), rel=1e-5)
        assert list(found.by_module) == sorted(set(examples.modules))
        for name, loss in found.by_module.items():
            rows = examples.modules == name
            assert loss[index] == pytest.approx(losses[rows].sum() / mask[rows].sum(), rel=1e-5)
    assert answer(program, state, examples, batch_size=2, say=said.append) == expected
    assert re.fullmatch(r"[\d,]+ tokens, [\d,]+ tokens/s", said[0])
    ids = [len(examples.tokenizer.encode(text)) + 1 for texts in expected for text in texts]
    assert int(said[0].split(" ")[0].replace(",", "")) <= sum(ids) + 2 * len(ids)


def greedy_without_cache(model, prompt, new_tokens, eos):
    graph, parameters = nnx.split(model)
    forward = jax.jit(lambda parameters, tokens: nnx.merge(graph, parameters)(tokens))
    tokens = list(prompt)
    for _ in range(new_tokens):
        padded = np.zeros((1, 64), np.int32)  # what comes later changes nothing before
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(parameters, padded)[0, len(tokens) - 1].argmax()))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


def test_generation_with_cache_and_padding_equals_one_text_at_a_time(population):
    program, state, examples = population
    answers = generate_answers(program, state, examples, batch_size=4)
    encoded, tokenizer = examples.encoded, examples.tokenizer
    longest = max(len(t) - n for t, n in zip(encoded.tokens, encoded.prompt_lengths, strict=True))
    for index in range(2):
        model = member(population, index)
        for row in (0, 3, 9):
            prompt = encoded.tokens[row][: encoded.prompt_lengths[row]]
            expected = greedy_without_cache(model, prompt, longest, tokenizer.eos_id)
            assert answers[index][row] == tokenizer.decode(expected)


def test_generation_stops_at_the_end_token(population):
    model = member(population, 0)
    prompts = jnp.asarray([[1, 50, 60], [1, 40, 30]])
    free = np.asarray(generate(model, prompts, jnp.ones_like(prompts), new_tokens=6, eos_id=-1))
    eos = int(free[0, 2])
    ends = nnx.jit(
        lambda model: generate(model, prompts, jnp.ones_like(prompts), new_tokens=6, eos_id=2, end_ids=(eos, 97))
    )
    stopped = np.asarray(generate(model, prompts, jnp.ones_like(prompts), new_tokens=6, eos_id=eos))
    for row, whole in zip(stopped, free, strict=True):
        end = int(np.argmax(whole == eos)) if eos in whole else 6
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == eos).all()
    np.testing.assert_array_equal(ends(model), np.where(stopped == eos, 2, stopped), "others are returned as the first")


def test_tokens_are_drawn_from_the_tempered_distribution(population):
    """2000 rows of one prompt: second tokens, given the commonest first, against the softmax of their own logits."""
    model = member(population, 0)
    prompts = jnp.tile(jnp.asarray([[1, 50, 60]]), (2000, 1))
    drawn = nnx.jit(
        lambda model, key: generate(
            model, prompts, jnp.ones_like(prompts), new_tokens=2, eos_id=-1, temperature=1.5, key=key
        )
    )
    found = np.asarray(drawn(model, jax.random.key(0)))
    assert (found == np.asarray(drawn(model, jax.random.key(0)))).all()
    assert (found != np.asarray(drawn(model, jax.random.key(1)))).any()
    first = np.bincount(found[:, 0]).argmax()
    for tokens, seen in ([1, 50, 60], found[:, 0]), ([1, 50, 60, first], found[found[:, 0] == first, 1]):
        expected = np.asarray(jax.nn.softmax(model(jnp.asarray([tokens]))[0, -1] / 1.5))
        shares = np.bincount(seen, minlength=len(expected)) / len(seen)
        deviation = np.sqrt(expected * (1 - expected) / len(seen))
        assert len(seen) > 50
        assert (np.abs(shares - expected) < 5 * deviation + 1 / len(seen)).all()


def test_what_is_not_finite_is_named(population):
    model = member(population, 0)
    assert what_is_not_finite(nnx.state(model)).startswith("all weights are finite, so that something overflows")
    up = model.layers.mlp.up_proj
    up.scale[...] = up.scale[...] * jnp.inf
    assert what_is_not_finite(nnx.state(model)) == "the scale of the adapters is not finite; look at adapter.alpha"
    up.base.kernel[...] = up.base.kernel[...].at[1, 2, 3].set(jnp.nan)
    assert "the weight model.layers.1.mlp.up_proj.weight holds a NaN" in what_is_not_finite(nnx.state(model))


def test_logits_that_are_not_finite_end_a_text_with_a_token_of_their_own(population):
    """The second prompt holds a token whose embedding is not finite; its row alone."""
    model = member(population, 0)
    prompts = jnp.asarray([[1, 50, 60], [1, 50, 90]])
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    model.lm_head = nnx.Linear(16, 98, use_bias=False, rngs=nnx.Rngs(0))
    model.embed_tokens.embedding[...] = model.embed_tokens.embedding[...].at[90].set(jnp.nan)
    found = np.asarray(generate(model, prompts, jnp.ones_like(prompts), new_tokens=3, eos_id=2))
    assert found[1].tolist() == [-1, 2, 2]
    assert (found[0] >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": 0.5}, "0.5 needs a key to draw with, got None"),
    ],
)
def test_bad_temperatures(population, options, message):
    prompts = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=message):
        generate(member(population, 0), prompts, prompts, new_tokens=1, eos_id=-1, **options)


def test_accuracy_by_module(population):
    examples = population[2]
    texts = examples.answers.copy()
    texts[0] += "0"
    shares = accuracies(texts.tolist(), examples)
    assert shares["all"] == pytest.approx(1 - 1 / len(texts))
    assert shares[examples.modules[0]] == pytest.approx(1 - 1 / np.sum(examples.modules == examples.modules[0]))
    assert {v for k, v in shares.items() if k not in ("all", examples.modules[0])} == {1.0}


def test_longest_generated_answer_can_be_set(population):
    program, state, examples = population
    free = answer(program, state, examples, batch_size=10, max_new_tokens=20)
    short = answer(program, state, examples, batch_size=10, max_new_tokens=2)
    assert max(len(text) for texts in free for text in texts) > 10
    assert max(len(text) for texts in short for text in texts) == 2
    for whole, beginning in zip(np.ravel(free), np.ravel(short), strict=True):
        assert whole.startswith(beginning)


def test_score_of_the_data_set_decides(population):
    examples = population[2]
    wordy = [f"it is {number}, so #### {number}" for number in range(len(examples.answers))]
    right = np.array([f"#### {number}.0" for number in range(len(wordy))])
    assert accuracies(wordy, examples._replace(answers=right, score=same_final_answer))["all"] == 1
    assert accuracies(wordy, examples._replace(answers=right))["all"] == 0
    with pytest.raises(ValueError, match="must have a score"):
        accuracies(wordy, examples._replace(score=None))


CHOICES = [["7", "8", "9"], ["x", "y"], ["12", "3", "456", "z"], ["q", "r", "s"], ["0", "1"]]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_chosen_answer_is_the_likeliest_after_the_prompt(population, batch_size):
    program, state, examples = population
    tokenizer = examples.tokenizer
    prompts = [f"{'Which? ' * i}Answer: " for i in range(1, len(CHOICES) + 1)]
    data = datasets.Dataset.from_dict(
        {"module": ["m"] * 5, "prompt": prompts, "answer": [c[0] for c in CHOICES], "choices": CHOICES}
    )
    encoded = encode(data, tokenizer, max_length=100)
    asked = EvaluationSet.build(encoded, data, tokenizer, score=examples.score)
    chosen = answer(program, state, asked, batch_size=batch_size)
    for index in range(2):
        graph, parameters = nnx.split(member(population, index))
        forward = jax.jit(lambda parameters, tokens, graph=graph: nnx.merge(graph, parameters)(tokens))
        for prompt, choices, found in zip(prompts, CHOICES, chosen[index], strict=True):
            likelihoods = []
            for choice in choices:
                before, after = [tokenizer.bos_id, *tokenizer.encode(prompt)], tokenizer.encode(choice)
                tokens = np.zeros((1, 64), np.int32)
                tokens[0, : len(before + after)] = before + after
                logs = np.asarray(jax.nn.log_softmax(forward(parameters, tokens)[0]))
                likelihoods.append(sum(logs[len(before) + i - 1, token] for i, token in enumerate(after)))
            assert found == choices[int(np.argmax(likelihoods))]
    assert len({text for texts in chosen for text in texts}) > 2
