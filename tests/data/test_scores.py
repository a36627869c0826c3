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
        # a number in an expression is not the answer
        *(
            (f"The answer is: {wrong}", f"The answer is: {number}", False)
            for wrong, number in (
                (r"\frac{1}{2}", 1),
                (r"2\pi", 2),
                (r"\sqrt{3}", 3),
                (r"4\sqrt{2}", 4),
                ("2^{10}", 2),
                ("10^6", 10),
                ("3x+2", 3),
                ("3 x + 2", 3),
                ("5-3", 5),
                ("5 - 3", 5),
                ("1e3", 1),
                ("5:30", 5),
                ("12x", 12),
                ("x3", 3),
                ("5 + 7", 5),
                ("5 * 7", 5),
                ("5!", 120),
                (r"\frac{\pi}{2}", 2),
                ("3, 4", 4),
            )
        ),
        # ways to write a number
        *(
            (f"#### {written}", f"#### {number}", True)
            for written, number in (
                ("1 1/2", "1.5"),
                ("5 10", 5),
                ("1{,}000", 1000),
                (r"1,\!000", 1000),
                (r"\frac{1}{2}", 0.5),
                (r"\dfrac{1}{2}", r"\frac{1}{2}"),
                ("1/2", r"\frac{1}{2}"),
                ("-1/2", "-0.5"),
                ("20, as 3 = 3", 20),
                ("20 (4*5=20, then 1 = 1)", 20),
                ("7", "x=7"),
                ("x = 7", 7),
                ("90", r"90^\circ"),
                ("12 cm^2", 12),
                ("5km", 5),
                ("60 miles/hour", 60),
                ("5 m", 5),
                ("3 m/s", 3),
                ("-$3", -3),
                ("(3)", 3),
                (r"\boxed{\frac{3}{4}}", "3/4"),
                ("20 dollars per 3 hours", 20),
                ("about 5", 5),
                ("5 apples. They", 5),
                (r"12\text{ cm}", 12),
                (r"\text{5 pm}", 5),
                ("€ 5", 5),
                ("the 5th", 5),
                ("1,000,000 people", 10**6),
                ("20-year-old", 20),
                ("- 3", -3),
            )
        ),
    ],
)
def test_final_answers(text, answer, right):
    assert same_final_answer(text, answer) is right


@pytest.mark.parametrize(("text", "right"), [(" B", True), ("B\n", True), ("b", False), ("B.", False), ("", False)])
def test_exact_match(text, right):
    assert exact_match(text, "B") is right
