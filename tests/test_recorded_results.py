"""Results that are recorded must be reproducible: each names the commit that made it, and nothing was changed since."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file for folder in ("experiments", "benchmarks") for file in (ROOT / folder).rglob("*.json*") if file.is_file()
)
WITHOUT_ENVIRONMENT = {
    "experiments/pretrain_base/record.json",  # of the shipped base, which has its own history
    "experiments/quickstart/evaluations.jsonl",  # these two with environment.json beside them
    "experiments/quickstart/results.json",
}
TO_BE_RECORDED_AGAIN = {
    "experiments/gauges/language_model.json",
}
"""Records of code that was not committed. What is recorded again from a commit leaves this set."""


def environments(value):
    """All environments in a value of JSON."""
    if isinstance(value, dict):
        if {"commit", "uncommitted_changes"} & value.keys():
            yield value
        value = value.values()
    elif not isinstance(value, list):
        return
    for item in value:
        yield from environments(item)


def recorded(file):
    text = file.read_text()
    return list(environments([json.loads(t) for t in (text.splitlines() if file.suffix == ".jsonl" else [text])]))


def faults(found, is_ancestor):
    """What is wrong with environments."""
    return [
        f"{one.get('commit')}: {'changes were not committed' if one.get('uncommitted_changes') else 'no such commit'}"
        for one in found
        if one.get("uncommitted_changes") is not False or not is_ancestor(one.get("commit"))
    ]


@pytest.fixture(scope="module")
def is_ancestor():
    """Whether a commit is one that this one comes from; what git cannot tell, of an archive say, is not asked."""

    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    try:
        shallow = git("rev-parse", "--is-shallow-repository").stdout.strip()
    except OSError:
        shallow = ""
    if shallow != "false":
        return lambda commit: True
    commits = set(git("rev-list", "HEAD").stdout.split())
    return commits.__contains__


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_record_names_the_commit_that_made_it(file, is_ancestor):
    name, found = str(file.relative_to(ROOT)), recorded(file)
    assert (not found) == (name in WITHOUT_ENVIRONMENT), f"{name} has no environment"
    wrong = faults(found, is_ancestor)
    if name in TO_BE_RECORDED_AGAIN:
        assert wrong, f"{name} has been recorded again: take it out of TO_BE_RECORDED_AGAIN"
    else:
        assert not wrong


def test_exceptions_exist():
    names = {str(file.relative_to(ROOT)) for file in FILES}
    assert names >= TO_BE_RECORDED_AGAIN | WITHOUT_ENVIRONMENT


def test_faults_are_found():
    """As the files have none, once all are recorded again."""
    good = {"commit": "a", "uncommitted_changes": False}
    records = [good, {"rows": [{"environment": good | {"uncommitted_changes": True}}]}, {"commit": "b"}]
    found = list(environments(records))
    assert len(found) == 3
    assert faults(found, {"a"}.__contains__) == ["a: changes were not committed", "b: no such commit"]
    assert faults([good | {"commit": None}], {"a"}.__contains__) == ["None: no such commit"]
