"""Files that are written whole or not at all, through no link, and JSON that may hold anything."""

import functools
import json

import pytest

from balora_jax.files import open_to_append, read_json, read_object, system_error, whole_file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON: "),
        (b'{"a": "\xff"}', "is not JSON: .*utf-8"),
        (b"[" * 200_000, "must be JSON that is nested at most 100 deep"),
        (b'{"a":' * 200_000, "must be JSON that is nested at most 100 deep"),
        (b"[" * 101 + b"]" * 101, "must be JSON that is nested at most 100 deep"),
        (b"9" * 10_000, "is not JSON: .*digits"),
        (b"", "is not JSON: "),
    ],
)
def test_json_that_cannot_be_read_is_named(content, reason, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json {reason}|x.json .*{reason}"):
        read_json(file)


@pytest.mark.parametrize(
    "value",
    [
        ["[" * 200],
        {"[{" * 60: '"[' * 60},
        [{"a": [i]} for i in range(200)],
        {"a": "\\" * 7 + '"' + "[" * 200, "b": "\n" + "[" * 200},
        functools.reduce(lambda inner, _: [inner], range(99), {}),
    ],
)
def test_brackets_in_texts_and_in_a_row_nest_nothing(value, tmp_path):
    for indent in (None, 1):
        (tmp_path / "x.json").write_text(json.dumps(value, indent=indent))
        assert read_json(tmp_path / "x.json") == value


@pytest.mark.parametrize("content", ["[1]", "5", '"a"', "null"])
def test_what_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json must hold a JSON object, got "):
        read_object(tmp_path / "x.json")


def test_json_is_read_in_any_encoding_of_unicode(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "x").write_bytes('{"a": "ü"}'.encode(encoding))
        assert read_json(tmp_path / "x") == {"a": "ü"}


@pytest.mark.parametrize("planted", ["x", "x.tmp"])
def test_no_link_is_followed(planted, tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / planted).symlink_to(tmp_path / "victim")
    with whole_file(tmp_path / "x") as file:
        file.write("new")
    assert (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(tmp_path / "link")
    assert (tmp_path / "victim").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "victim", "x"]


def test_an_error_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TypeError, match="bytes"), whole_file(tmp_path / "x", "wb") as file:
        file.writelines([b"new", "text"])
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_error_behind_an_error():
    full = OSError(28, "full")
    inner = ValueError("closed")
    inner.__context__ = full
    outer = RuntimeError("generation")
    outer.__cause__ = inner
    assert system_error(outer) is full
    assert system_error(full) is full
    assert system_error(ValueError()) is None
