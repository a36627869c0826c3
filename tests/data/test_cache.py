"""Work on data sets is done once, and again where what it depends on has changed or its file is damaged."""

import datasets
import pytest

from balora_jax.data import cache

FEATURES = datasets.Features({"y": datasets.Value("int32")})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for every test, in small shards."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(cache, "_SHARD", 4)
    return tmp_path / "cache" / "balora_jax"


class Work:
    """Twice every x but 3; counts the rows that it has seen."""

    def __init__(self):
        self.seen = []

    def __call__(self, batch):
        self.seen.extend(batch["x"])
        return {"y": [2 * x for x in batch["x"] if x != 3]}


def on_disk(folder, numbers):
    """A data set of numbers that lies in a file."""
    datasets.Dataset.from_dict({"x": list(numbers)}).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def mapped(numbers, work, key="double"):
    return cache.mapped(numbers, work, features=FEATURES, key=key, description="Doubling")["y"][:]


def test_rows_on_disk_are_worked_on_once_shard_by_shard(tmp_path, folder):
    work, expected = Work(), [2 * x for x in range(10) if x != 3]
    assert mapped(on_disk(tmp_path / "a", range(10)), work) == expected
    assert work.seen == list(range(10))
    assert len(list(folder.glob("*.arrow"))) == len(list(folder.glob("*.sha256"))) == 3
    assert mapped(on_disk(tmp_path / "b", range(10)), work) == expected, "the same rows in another place"
    assert work.seen == list(range(10))


def test_another_key_or_other_rows_are_other_work(tmp_path):
    numbers, work = on_disk(tmp_path / "a", range(4)), Work()
    mapped(numbers, work)
    mapped(numbers, work, key=("double", 2))
    assert work.seen == 2 * list(range(4))
    assert mapped(on_disk(tmp_path / "b", range(2, 10)), work) == [4, 8, 10, 12, 14, 16, 18]
    assert work.seen[8:] == list(range(2, 10))


def test_rows_in_memory_are_worked_on_in_memory(folder):
    numbers, work = datasets.Dataset.from_dict({"x": [1, 2, 3]}), Work()
    for _ in range(2):
        assert mapped(numbers, work) == [2, 4]
    assert work.seen == 2 * [1, 2, 3]
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["cut", "other content", "no seal", "another seal"])
def test_a_damaged_file_is_made_anew(damage, tmp_path, folder):
    numbers, work = on_disk(tmp_path / "a", range(4)), Work()
    expected = mapped(numbers, work)
    (file,) = folder.glob("*.arrow")
    seal = file.with_suffix(".sha256")
    content = file.read_bytes()
    if damage == "no seal":
        seal.unlink()
    elif damage == "another seal":
        seal.write_text("0" * 64)
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content.replace(b"\x02\0\0\0", b"\x05\0\0\0"))
        assert file.read_bytes() != content
    assert mapped(numbers, work) == expected
    assert work.seen == 2 * list(range(4))
    assert sorted(folder.iterdir()) == [file, seal], "and nothing is left beside"


def test_written_rows_depend_on_their_files_and_the_key(tmp_path):
    source, calls = tmp_path / "numbers.txt", []

    def rows():
        calls.append(1)
        return ({"y": int(line)} for line in source.read_text().split())

    def written(key="numbers"):
        return cache.written(rows, files=[source], features=FEATURES, key=key)["y"][:]

    source.write_text("1 2 3")
    assert written() == written() == [1, 2, 3]
    assert len(calls) == 1
    written(key="again")
    source.write_text("4 5")
    assert written() == [4, 5]
    assert len(calls) == 3


def test_an_error_of_the_work_is_raised_as_it_is_and_leaves_no_file(tmp_path, folder):
    def fail(batch):
        raise ZeroDivisionError("of the function")

    with pytest.raises(ZeroDivisionError, match="of the function"):
        mapped(on_disk(tmp_path / "a", range(4)), fail)
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, folder):
    folder.parent.mkdir()
    folder.touch()
    with pytest.raises(ValueError, match=r"the cache .*balora_jax cannot be written .* set the environment"):
        mapped(on_disk(tmp_path / "a", range(4)), Work())
