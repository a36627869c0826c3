"""Which questions are for evaluation: a property of the question's content, so that no seed can move it."""

import hashlib
import re
from string import ascii_lowercase

EVALUATION_BYTES = 32
"""A question is for evaluation if the first byte of its hash is below this number: one in eight."""

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[a-z]+|[-+*/]")

# Words that carry an operation stand for its sign.
_OPERATIONS = {
    "+": "add plus sum together",
    "-": "minus subtract difference",
    "*": "times multiply multiplied product",
    "/": "divide divided divides divisible divisor factor gcd hcf mod modulo over quotient",
}
# Words of phrasing say how a question is put, and not which problem it is.
_PHRASING = """
    above after all an and are arrange as ascending at be before below between big bigger biggest both by
    calculate closest collect comes common compute convert decide decreasing denominator derivative
    descending determine differentiate digit digits distinct does each evaluate exactly expand expanded
    expression find first for from get give given gives greater greatest high highest how if in increasing
    integer into is it know largest later lcm least leaves left less let letters list low lowest many me
    more most multiple nearest next now number numbers of off on one or order out pick picked picking prob
    probability put reading rearrange remainder replacement respect rewrite roots round rounded same
    sequence sequences series simplify small smaller smallest so solve sort such take term terms than that
    the then there these this time to true until using value values was we what when whether which whole
    with without work write zero
"""
_MEANING = (
    dict.fromkeys(ascii_lowercase, "")
    | dict.fromkeys(_PHRASING.split(), "")
    | {word: sign for sign, words in _OPERATIONS.items() for word in words.split()}
)


def canonical(question: str) -> str:
    """Reduce a question to its content: its numbers, signs and telling words, sorted.

    Two questions with the same canonical form belong to the same class of the split. The form forgets
    the phrasing, the letters of unknowns, and the order of operands. It is coarser than needed in places
    (`7 - 3` and `3 - 7` share a form), which can only widen the gap between training and evaluation.

    Args:
        question: Text of a question.

    Returns:
        The canonical form.

    Examples:
        >>> canonical("What is 3 + 4?") == canonical("Add 4 and 3.")
        True
    """
    meaning = _MEANING.get
    tokens = [meaning(token, token) for token in _TOKEN.findall(question.lower())]
    return " ".join(sorted(filter(None, tokens)))


def is_evaluation_question(question: str) -> bool:
    """Tell whether a question belongs to the evaluation class, which training never sees.

    The class depends on the text of the question alone: the first byte of the BLAKE2b hash of its
    canonical form decides, and one content in eight is for evaluation.

    Args:
        question: Text of a question, generated or not.

    Returns:
        True for a question of the evaluation class, False for one of the training class.
    """
    return hashlib.blake2b(canonical(question).encode(), digest_size=8).digest()[0] < EVALUATION_BYTES
