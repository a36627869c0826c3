import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from balora_jax.data.mathematics import MODULES, Example, generate, is_evaluation_question, read_folder
from balora_jax.data.mathematics.generation import _TABLE
from balora_jax.data.mathematics.split import canonical

DIFFICULTIES = range(1, 7)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_both_classes_have_questions_and_share_none(module, difficulty):
    train = {example.question for example in generate([module], 60, difficulty=difficulty, seed=1)}
    evaluation = [e.question for e in generate([module], 20, difficulty=difficulty, seed=2, split="evaluation")]
    assert len(set(evaluation)) == 20
    assert not train & set(evaluation)
    assert all(map(is_evaluation_question, evaluation))
    assert not any(map(is_evaluation_question, train))


class OnePhrasing(random.Random):
    """Draws like its parent, but always picks the same phrasing."""

    phrasing = 0

    def choice(self, seq):
        drawn = super().choice(seq)
        is_phrasings = isinstance(seq, tuple) and isinstance(seq[0], str) and "{" in seq[0]
        return seq[self.phrasing % len(seq)] if is_phrasings else drawn


@pytest.mark.parametrize("module", MODULES)
def test_phrasing_does_not_change_the_class(module):
    for seed in range(60):
        forms, questions = set(), set()
        for phrasing in range(4):
            rng = OnePhrasing(seed)
            rng.phrasing = phrasing
            question, answer = _TABLE[module](rng, 1 + seed % 6)
            questions.add(question)
            forms.add((canonical(question), answer))
        assert len(questions) > 1
        assert len(forms) == 1, questions


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 3 + 4?", "Add 4 and 3."),
        ("Solve 3*x = 12 for x.", "What is y if 12 = 3*y?"),
        ("What is 12 divided by 4?", "Calculate 12/4."),
        ("Sort 3, 1, 2.", "Put 1, 2, 3 in decreasing order."),
    ],
)
def test_same_content_is_of_the_same_class(first, second):
    assert canonical(first) == canonical(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 3 + 4?", "What is 3 + 5?"),
        ("Is 3 prime?", "What is 3?"),
    ],
)
def test_other_content_is_told_apart(first, second):
    assert canonical(first) != canonical(second)


def test_one_content_in_eight_is_for_evaluation():
    share = np.mean([is_evaluation_question(f"What is {p} + {q}?") for p in range(100, 200) for q in range(200, 300)])
    assert abs(share - 1 / 8) < 0.015


def fingerprint(examples):
    return hashlib.sha256(repr(examples).encode()).hexdigest()


@pytest.mark.parametrize("hash_seed", ["0", "77"])
def test_same_examples_in_every_process(hash_seed):
    code = (
        "import hashlib; from balora_jax.data.mathematics import *;"
        "examples = generate(MODULES, 400, difficulty=(1, 2, 5), seed=3);"
        "print(hashlib.sha256(repr(examples).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(generate(MODULES, 400, difficulty=(1, 2, 5), seed=3))


def test_modules_take_turns_and_longer_lists_continue_shorter_ones():
    names = ["numbers__gcd", "arithmetic__mul"]
    examples = generate(names, 101, seed=4, difficulty=2)
    assert [example.module for example in examples] == [names[i % 2] for i in range(101)]
    assert examples[:50] == generate(names, 50, seed=4, difficulty=2)
    assert examples[1::2] == generate(["arithmetic__mul"], 50, seed=4, difficulty=2)
    assert examples[:50] != generate(names, 50, seed=5, difficulty=2)
    assert generate(names, 0) == []


def test_difficulties_are_mixed():
    examples = generate(["numbers__place_value"], 300, difficulty=(1, 5))
    digits = Counter(sum(map(str.isdigit, example.question)) for example in examples)
    assert digits[2] > 100
    assert digits[6] > 90


def test_exhausted_module_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"'arithmetic__mul'.*found \d+ distinct"):
        generate(["arithmetic__mul"], 500, split="evaluation")
    assert len(generate(["arithmetic__mul"], 5000, split="train")) == 5000


@pytest.mark.parametrize(
    ("modules", "options", "message"),
    [
        (["arithmetic__mull"], {}, "'arithmetic__mull'; the nearest is 'arithmetic__mul'"),
        ([], {}, "`modules` must name at least one"),
        (["numbers__gcd"], {"difficulty": 0}, "`difficulty` must be an integer from 1 to 8, got 0"),
        (["numbers__gcd"], {"difficulty": 9}, "`difficulty` must be an integer from 1 to 8, got 9"),
        (["numbers__gcd"], {"difficulty": (1, 2.5)}, "`difficulty` must be an integer from 1 to 8, got 2.5"),
        (["numbers__gcd"], {"difficulty": ()}, "`difficulty` must name at least one"),
        (["numbers__gcd"], {"count": -1}, "`count` must be an integer of at least 0, got -1"),
        (["numbers__gcd"], {"split": "test"}, '`split` must be "train" or "evaluation", got \'test\''),
    ],
)
def test_bad_arguments(modules, options, message):
    with pytest.raises(ValueError, match="`") as error:
        generate(modules, **({"count": 3} | options))
    assert message in str(error.value)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_rejects_difficulty_zero(module):
    with pytest.raises(ValueError, match="`difficulty` must be an integer from 1 to 8, got 0"):
        _TABLE[module](random.Random(0), 0)
    assert all(_TABLE[module](random.Random(0), 8))


@pytest.fixture
def published(tmp_path):
    for part in ("train-easy", "interpolate"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "numbers__gcd.txt").write_text(f"In {part}?\n1\nAnd?\n2\nThen?\n3\n")
    (tmp_path / "interpolate" / "numbers__lcm.txt").write_text("What?\n4\nWhy?\n")
    return tmp_path


def test_read_folder(published):
    examples = list(read_folder(published, ["numbers__gcd"], split=("interpolate", "train-easy"), limit=2))
    assert examples[:2] == [
        Example("numbers__gcd", "In interpolate?", "1"),
        Example("numbers__gcd", "And?", "2"),
    ]
    assert [example.question for example in examples[2:]] == ["In train-easy?", "And?"]
    assert len(list(read_folder(str(published), ["numbers__gcd"], split="train-easy"))) == 3
    assert list(read_folder(published, ["numbers__gcd"], split="train-easy", limit=0)) == []


@pytest.mark.parametrize(
    ("folder", "module", "split", "error", "message"),
    [
        ("", "numbers__lcm", "train-easy", FileNotFoundError, "holds numbers__gcd.txt"),
        ("", "numbers__gcd", "train-hard", FileNotFoundError, "holds interpolate, train-easy"),
        ("nowhere", "numbers__gcd", "train-easy", FileNotFoundError, "nowhere"),
        (
            "",
            "numbers__lcm",
            "interpolate",
            ValueError,
            "numbers__lcm.txt, line 3: a question without an answer",
        ),
    ],
)
def test_read_folder_errors(published, folder, module, split, error, message):
    with pytest.raises(error) as raised:
        list(read_folder(published / folder, [module], split=split))
    assert message in str(raised.value)
