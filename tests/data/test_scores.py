"""Which answers count as right."""

import pytest

from balora_jax.data.scores import exact_match, same_final_answer


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "more words\n#### 72", True),
        ("#### 1234", "#### 1,234", True),
        ("#### 1,234,567.0", "#### 1234567", True),
        ("#### 12,34", "#### 1234", False),
        ("#### 73", "#### 72", False),
        ("72", "#### 72", True),
        ("He has 70 and gets 2, so 72 apples.", "#### 72", True),
        ("He has 72 and gives 2.", "#### 72", False),
        ("#### 72\n\nQuestion: 5?", "#### 72", True),
        ("The answer is: 42", "The answer is: 42", True),
        ("The answer is 42.", "The answer is: 42", True),
        ("the Answer is: $42.50 per hour.", "The answer is: 42.5", True),
        ("The answer is: 42 dollars.", "The answer is: 42", True),
        ("The answer is: \\$42\\%", "The answer is: 42", True),
        ("The answer is: 42%", "#### 42", True),
        ("The answer is: 0.5", "The answer is: 1/2", True),
        ("The answer is: .5", "The answer is: 0.50", True),
        ("The answer is: -3", "The answer is: 3", False),
        ("The answer is: \N{MINUS SIGN}3", "The answer is: -3", True),
        ("The answer is: 1/0", "The answer is: 1", False),
        ("The answer is: \\boxed{8}", "The answer is: 8", True),
        ("The answer is 3? No, the answer is: 4", "The answer is: 4", True),
        ("The answer is:", "The answer is: 4", False),
        ("", "#### 4", False),
        ("The answer is: \\frac{1}{2}", "The answer is: $\\frac{1} {2}$.", True),
        ("The answer is: \\frac{1}{3}", "The answer is: \\frac{1}{2}", False),
        ("The answer is: 1", "The answer is: \\frac{1}{2}", False),
        ("no mark", "no number either", False),
    ],
)
def test_final_answers(text, answer, right):
    assert same_final_answer(text, answer) is right


@pytest.mark.parametrize(("text", "right"), [(" B", True), ("B\n", True), ("b", False), ("B.", False), ("", False)])
def test_exact_match(text, right):
    assert exact_match(text, "B") is right
