"""Whether an answer is right."""

import re
from collections.abc import Callable
from fractions import Fraction

Score = Callable[[str, str], bool]
"""From an answer and the right answer, as texts, to whether they agree."""

_MARKER = re.compile(r"####|answer is\s*:?", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(rf"(?:-\s?)?(?:\d+\s+\d+/\d+|{_DIGITS}(?:\.\d+|\s?/\s?\d+)?|\.\d+)")
# What may stand between a number and what it counts: words, short units, and of both the powers and quotients.
_WORD = re.compile(r"-?(?:[^\W\d_]{2,}|(?<=[\s/])[mgslhLMWVANJKCF](?=$|[/^]))(?:\^\{?[23]\}?|[²³])?")
_REST = re.compile(r"(?:[\s/'\"!?]|(?<=\s)\d+)*")
# LaTeX that means no more than the text without it.
_LATEX = (
    (r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}", r" \1/\2 "),
    (r"\\boxed\s*\{([^{}]*)\}", r"\1"),
    (r"\{,\}|\\[,!;: ]|\\left|\\right", ""),
    (r"\^\s*\{?\s*\\circ\s*\}?|°", " "),
    (r"\\?[$%€£]", ""),
    ("\N{MINUS SIGN}", "-"),
)


def exact_match(text: str, answer: str) -> bool:
    """Whether two texts are equal, but for space around them.

    Examples:
        >>> exact_match(" 4*x - 1", "4*x - 1")
        True
    """
    return text.strip() == answer.strip()


def same_final_answer(text: str, answer: str) -> bool:
    """Whether two solutions end in the same answer, as GSM8K (`#### 72`) and MetaMathQA (`The answer is: 72`) end.

    A final answer is what follows the last such mark in its line, or the last number of a text without a mark. If that
    of the right solution is a number, the other's must be that number too: it is read from the first clause, behind an
    equals sign if there is one, and thousands separators, signs of money, percent and degrees, words and units around
    it, a period at the end, trailing zeros and the way to write a fraction make no difference. A number that is part of
    an expression (`2^{10}`, `3x + 2`) is none. Otherwise (MetaMathQA holds expressions such as `\\sqrt{2}`) the two
    must be the same up to spaces.

    Args:
        text: a solution.
        answer: the right solution.

    Examples:
        >>> same_final_answer("She pays 3 * 414. The answer is $1,242.00.", "3 * 414 = 1242\\n#### 1242")
        True
        >>> same_final_answer("The answer is 5 + 7 = 12", "#### 12")
        True
        >>> same_final_answer("The answer is 12x", "#### 12")
        False
    """
    found, right = _final_answer(text), _final_answer(answer)
    value = _number(right)
    if value is not None:
        return _number(found) == value
    right = re.sub(r"\s", "", right)
    return right != "" and re.sub(r"\s", "", found) == right


def _final_answer(text: str) -> str:
    """What follows the last mark, or the last number, without LaTeX that does not matter."""
    marks = list(_MARKER.finditer(text))
    if marks:
        text = next(iter(text[marks[-1].end() :].strip().splitlines()), "")
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    return (text if marks else (_NUMBER.findall(text) or [""])[-1]).strip().rstrip(".")


def _number(text: str) -> Fraction | None:
    """The value of an answer that is a number; None for any other."""
    clause = re.split(r"(?<=[^\s(])\s*[(;]|,\s|\.\s", text)[0].rsplit("=", 1)[-1].strip(" ()[]")
    number = _NUMBER.search(clause)
    if number is None:
        return None
    before, after = clause[: number.start()], clause[number.end() :]
    if before[-1:].isalpha() or re.search(r"[\\^*/+<>{}-]", before):
        return None
    if not _REST.fullmatch(_WORD.sub("", after)):
        return None
    try:
        sign = -1 if number[0].startswith("-") else 1
        parts = re.sub(r"\s?/\s?", "/", number[0].lstrip("- ").replace(",", "")).split()
        return sign * sum(map(Fraction, parts), Fraction(0))
    except (ValueError, ZeroDivisionError):  # more digits than Python reads
        return None
