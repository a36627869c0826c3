"""Whether an answer is right."""

import re
from collections.abc import Callable
from fractions import Fraction

Score = Callable[[str, str], bool]
"""From an answer and the right answer, as texts, to whether they agree."""

_MARKER = re.compile(r"####|answer is\s*:?", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?|-?\.\d+")


def exact_match(text: str, answer: str) -> bool:
    """Whether two texts are equal, but for space around them.

    Example:
        >>> exact_match(" 4*x - 1", "4*x - 1")
        True
    """
    return text.strip() == answer.strip()


def same_final_answer(text: str, answer: str) -> bool:
    """Whether two solutions end in the same answer, as GSM8K (`#### 72`) and MetaMathQA (`The answer is: 72`) end.

    A final answer is what follows the last such mark in its line, or the last number of a text without a mark. If that
    of the right solution is a number, the first number of the other's counts, behind its last equals sign if it has
    one: thousands separators, signs of money and percent, units, a period at the end and trailing zeros make no
    difference. Otherwise (MetaMathQA holds expressions such as `\\frac{1}{2}`) the two must be the same up to spaces.

    Args:
        text: a solution.
        answer: the right solution.

    Example:
        >>> same_final_answer("She pays 3 * 414. The answer is $1,242.00.", "3 * 414 = 1242\\n#### 1242")
        True
        >>> same_final_answer("The answer is 5 + 7 = 12", "#### 12")
        True
    """
    found, right = _final_answer(text), _final_answer(answer)
    if not _NUMBER.fullmatch(right):
        return right != "" and found == right
    number = _NUMBER.search(found.rsplit("=", 1)[-1])
    return number is not None and _value(number[0]) == _value(right)


def _final_answer(text: str) -> str:
    """What follows the last mark, or the last number, without spaces and signs that do not matter."""
    text = text.replace("\N{MINUS SIGN}", "-")
    marks = list(_MARKER.finditer(text))
    if marks:
        lines = text[marks[-1].end() :].strip().splitlines()
        tail = lines[0] if lines else ""
    else:
        tail = (_NUMBER.findall(re.sub(r"[\\$%]", "", text)) or [""])[-1]
    return re.sub(r"\\?[$%]|\s", "", tail).rstrip(".")


def _value(number: str) -> Fraction | None:
    """The number, or None for a division by zero."""
    try:
        return Fraction(number.replace(",", ""))
    except ZeroDivisionError:
        return None
