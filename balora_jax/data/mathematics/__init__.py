"""School mathematics as questions and answers, in the manner of the DeepMind Mathematics dataset.

`generate` draws examples without end and without files; `read_folder` reads the published dataset
(arXiv:1904.01557). Modules have the names that they have there, `area__topic`, and every module takes a
difficulty from 1 to 8: about the number of digits in arithmetic, and of items, terms or degree elsewhere.
"""

from balora_jax.data.mathematics.generation import MODULES, Example, generate
from balora_jax.data.mathematics.published import list_files, read_folder
from balora_jax.data.mathematics.split import is_evaluation_question

__all__ = ["MODULES", "Example", "generate", "is_evaluation_question", "list_files", "read_folder"]
