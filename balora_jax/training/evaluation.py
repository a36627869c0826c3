"""Evaluation of a population: loss per example, and answers, generated greedily or chosen by their likelihood."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.adapters import AdapterScale
from balora_jax.data.batches import Arrays, Encoded, Tokenizer, pad, pad_left
from balora_jax.data.lengths import batches_by_length
from balora_jax.data.scores import Score, exact_match
from balora_jax.models import Decoder
from balora_jax.models.generation import generate
from balora_jax.models.weights import tensor_name
from balora_jax.training.progress import Say
from balora_jax.training.state import TrainState
from balora_jax.training.step import Batch

MOST_ANSWERS, LONGEST_ANSWER = 100, 2000
"""Answers of a run that are kept, and characters of each."""


class Evaluated(Protocol):
    """The functions of a population that an evaluation uses; see `balora_jax.training.program.Program`."""

    base: nnx.State

    @property
    def evaluate(self) -> Callable[[TrainState, nnx.State, Batch], tuple[jax.Array, jax.Array]]:
        """Returns summed losses and numbers of predicted tokens, `(members, rows)` each."""

    @property
    def member_model(self) -> Callable[[TrainState, nnx.State], Decoder]:
        """Returns the model of one member."""

    def by_rows(self, function: Callable[[TrainState, nnx.State, Any], Any]) -> Callable[..., Any]:
        """Compiles a function of rows."""

    def over_members(self, function: Callable, *arguments: Any) -> Any:
        """Applies a function to every member."""


class EvaluationSet(NamedTuple):
    """Examples to evaluate on.

    Attributes:
        encoded: their tokens.
        modules: `(n,)` the part of the data set each belongs to.
        answers: `(n,)` the right answers, as text.
        tokenizer: the tokenizer.
        score: whether an answer is right; None where there are no answers, only a loss.
        choices: for each example the answers to choose from; None where answers are free.
        prompts: for each example the question as text; None where there are no answers.
    """

    encoded: Encoded
    modules: np.ndarray
    answers: np.ndarray
    tokenizer: Tokenizer
    score: Score | None = exact_match
    choices: list[list[str]] | None = None
    prompts: list[str] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, self.encoded.tokens))

    @property
    def arrays(self) -> Arrays:
        """One row per example, as long as the longest of them: what is evaluated, in one batch."""
        return pad(self.encoded, length=self.longest, pad_id=self.tokenizer.pad_id).arrays()

    @property
    def score_name(self) -> str | None:
        """What the share of right answers is called; None without a score."""
        if self.score is None:
            return None
        return "right choice" if self.choices is not None else self.score.__name__.replace("_", " ")

    @classmethod
    def build(
        cls,
        encoded: Encoded,
        examples: datasets.Dataset,
        tokenizer: Tokenizer,
        *,
        score: Score | None,
    ) -> "EvaluationSet":
        """Takes from a data set what belongs to its examples that were kept."""
        columns = examples.select(encoded.kept)[:]
        answers = np.asarray(columns["answer"] if score else [""] * len(encoded.kept))
        modules, texts = np.asarray(columns["module"]), [columns.get(name) for name in ("choices", "prompt")]
        return cls(encoded, modules, answers, tokenizer, score, *texts)


class Losses(NamedTuple):
    """Evaluation losses of a population.

    Attributes:
        total: `(members,)` mean over all predicted tokens, in nats.
        by_module: for each module, `(members,)`.
    """

    total: np.ndarray
    by_module: dict[str, np.ndarray]


def evaluate_loss(program: Evaluated, state: TrainState, examples: EvaluationSet, *, batch_size: int) -> Losses:
    """Returns the evaluation losses of every member.

    Args:
        program: the population's functions.
        state: the population's state.
        examples: what to evaluate on.
        batch_size: examples per call.
    """
    loss, count = _losses(program, state, examples.encoded, examples.tokenizer.pad_id, batch_size)

    def mean(where):
        return loss[:, where].sum(axis=1) / count[:, where].sum(axis=1)

    names = sorted(set(examples.modules.tolist()))
    return Losses(mean(slice(None)), {name: mean(examples.modules == name) for name in names})


def what_is_not_finite(base: nnx.State) -> str:
    """Says what to look at where a loss is not finite before anything has been trained.

    Args:
        base: the parameters that are not trained.
    """
    for path, variable in nnx.to_flat_state(base):
        value, name = variable[...], ".".join(str(part) for part in path if part != "base")
        if jnp.issubdtype(value.dtype, jnp.floating) and not jnp.isfinite(value).all():
            if isinstance(variable, AdapterScale):
                return "the scale of the adapters is not finite; look at adapter.alpha"
            if type(variable) is nnx.Param:
                name = tensor_name(name, int(jnp.argwhere(~jnp.isfinite(value))[0, 0]))
            return f"the weight {name} holds a NaN or an infinity"
    return (
        "all weights are finite, so that something overflows on the way: look at the scale of the adapters and at the "
        "size of the weights"
    )


def _losses(
    program: Evaluated, state: TrainState, encoded: Encoded, pad_id: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The summed loss of every example and its number of predicted tokens, `(members, examples)`."""
    shape = state.step.shape[0], len(encoded.tokens)
    losses, counts = np.zeros(shape), np.zeros(shape, np.int64)
    for rows, length in batches_by_length(list(map(len, encoded.tokens)), batch_size=batch_size):
        some = Encoded([encoded.tokens[i] for i in rows], [encoded.learned[i] for i in rows], rows)
        batch: Any = pad(some, length=length, pad_id=pad_id).arrays()
        losses[:, rows], counts[:, rows] = program.evaluate(state, program.base, batch)
    return losses, counts


def _prompts(examples: EvaluationSet) -> list[np.ndarray]:
    """The tokens before each example's answer."""
    return [t[:n] for t, n in zip(examples.encoded.tokens, examples.encoded.prompt_lengths, strict=True)]


def answer(
    program: Evaluated,
    state: TrainState,
    examples: EvaluationSet,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    say: Say | None = None,
) -> list[list[str]]:
    """Returns every member's answers to the examples' prompts: the likeliest choice, or what it generates.

    Args:
        program: the population's functions.
        state: the population's state.
        examples: what to answer.
        batch_size: rows per call.
        max_new_tokens: longest answer generated; None for the length of the longest right answer, beyond which no
            exact match can lie.
        say: is told how many tokens were generated, and how fast.
    """
    if examples.choices is not None:
        return choose_answers(program, state, examples, batch_size=batch_size)
    return generate_answers(program, state, examples, batch_size=batch_size, max_new_tokens=max_new_tokens, say=say)


def choose_answers(
    program: Evaluated, state: TrainState, examples: EvaluationSet, *, batch_size: int
) -> list[list[str]]:
    """Returns every member's answers: of each example's choices the one with the highest log-likelihood."""
    assert examples.choices is not None
    tokens, learned, owners = [], [], []
    for row, (prompt, choices) in enumerate(zip(_prompts(examples), examples.choices, strict=True)):
        for choice in choices:
            ending = examples.tokenizer.encode_continuation(choice)
            tokens.append(np.concatenate([prompt, ending]).astype(np.int32))
            learned.append(np.arange(len(tokens[-1])) >= len(prompt))
            owners.append(row)
    rows = Encoded(tokens, learned, np.arange(len(tokens)))
    losses, _ = _losses(program, state, rows, examples.tokenizer.pad_id, batch_size)
    owner = np.asarray(owners)
    best = np.stack([losses[:, owner == row].argmin(axis=1) for row in range(len(examples.choices))], axis=1)
    return [[choices[i] for choices, i in zip(examples.choices, member, strict=True)] for member in best]


def generate_answers(
    program: Evaluated,
    state: TrainState,
    examples: EvaluationSet,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    say: Say | None = None,
) -> list[list[str]]:
    """Returns every member's answers to the examples' prompts by greedy generation; arguments as for `answer`."""
    encoded, tokenizer = examples.encoded, examples.tokenizer
    prompts = _prompts(examples)
    new_tokens = max_new_tokens or max(len(t) - n for t, n in zip(encoded.tokens, encoded.prompt_lengths, strict=True))

    @program.by_rows
    def generate_all(states, base, rows):
        def member(state):
            model = program.member_model(state, base)
            eos, ends = tokenizer.eos_id, tokenizer.end_ids
            return generate(model, *rows, new_tokens=new_tokens, eos_id=eos, end_ids=ends)

        return program.over_members(member, states)

    members = [[""] * len(prompts) for _ in range(state.step.shape[0])]
    timed: list[tuple[bool, int, float]] = []  # whether it compiled, tokens, seconds
    lengths: set[int] = set()
    for rows, length in batches_by_length(list(map(len, prompts)), batch_size=batch_size):
        batch = pad_left([prompts[i] for i in rows], pad_id=tokenizer.pad_id, length=length)
        start = time.perf_counter()
        out = np.asarray(generate_all(state, program.base, batch))
        timed.append((length not in lengths, _count(out, tokenizer.eos_id), time.perf_counter() - start))
        lengths.add(length)
        for texts, generated in zip(members, out, strict=True):
            for row, ids in zip(rows, generated, strict=True):
                texts[row] = tokenizer.decode(ids[ids >= 0].tolist())
    if say is not None:
        say(f"{sum(count for _, count, _ in timed):,} tokens, {_rate(timed):,.0f} tokens/s")
    return members


def _count(generated: np.ndarray, eos_id: int) -> int:
    """Number of tokens up to the ends of texts `(..., new_tokens)`, these included."""
    ended = (generated == eos_id).cumsum(axis=-1) > 0
    return int((~ended).sum() + ended.any(axis=-1).sum())


def _rate(timed: Sequence[tuple[bool, int, float]]) -> float:
    """Tokens per second of the batches that did not compile; of all if all did."""
    kept = [(count, seconds) for compiled, count, seconds in timed if not compiled] or [one[1:] for one in timed]
    counts, seconds = zip(*kept, strict=True)
    return sum(counts) / sum(seconds)


def accuracies(texts: Sequence[str], examples: EvaluationSet) -> dict[str, float]:
    """Returns the share of right answers per module, and over all under the key `all`.

    Raises:
        ValueError: the examples have no score.
    """
    if examples.score is None:
        raise ValueError("examples must have a score to count right answers, got None")
    right = np.array([examples.score(*pair) for pair in zip(texts, examples.answers.tolist(), strict=True)])
    names = sorted(set(examples.modules.tolist()))
    return {"all": float(right.mean()), **{n: float(right[examples.modules == n].mean()) for n in names}}


def sample_answers(texts: Sequence[str], examples: EvaluationSet) -> list[dict[str, Any]]:
    """Returns some of a member's answers to look at, evenly spread over the examples, `MOST_ANSWERS` at the most.

    Args:
        texts: its answers, as `answer` returns them.
        examples: what was answered; they must have a score.

    Returns:
        For each the `module`, the `prompt`, the `expected` answer, the `answer`, and whether it is `right`; of texts
        the first `LONGEST_ANSWER` characters.
    """
    assert examples.score is not None
    assert examples.prompts is not None
    found = []
    for i in np.unique(np.linspace(0, len(texts) - 1, min(len(texts), MOST_ANSWERS)).round().astype(int)).tolist():
        expected = str(examples.answers[i])
        shown = {"prompt": examples.prompts[i], "expected": expected, "answer": texts[i]}
        found.append(
            {"module": str(examples.modules[i])}
            | {name: text[:LONGEST_ANSWER] for name, text in shown.items()}
            | {"right": bool(examples.score(texts[i], expected))}
        )
    return found
