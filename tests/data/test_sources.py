"""Files of data that are damaged, oddly named or beside others: what is wrong is said with the file and the line."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from connections import no_connections

from balora_jax.data.recipes import DataSettings, load
from balora_jax.data.sources import read_source

DEEP = 200_000


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [{"query": f"{i}?", "response": f"The answer is: {i}"} for i in range(6)]
THREE = lines(*ROWS[:3])
HEADER = b"query,response\na,b\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def guard():
    with no_connections():
        yield


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", THREE + b'{"query": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", "line 4 must be nested at most 100"),
        ("x.jsonl", THREE + b'{"z":' * DEEP + b"1" + b"}" * DEEP + b"\n", "line 4 must be nested at most 100 deep"),
        ("x.json", b"[" * DEEP, "line 1 must be nested at most 100 deep"),
        ("x.json", b"[\n" * DEEP, "must be JSON that is nested at most 100 deep"),
        ("x.json", b'[{"query": ' + b"[" * 5000 + b"]" * 5000 + b"}]", "line 1 must be nested at most 100 deep"),
        ("x.jsonl", THREE + b'{"query": "\xff", "response": "a"}\n', "line 4 must be text in UTF-8: .* byte 0xff"),
        ("x.json", b'[{"query": "\xff", "response": "a"}]', "line 1 must be text in UTF-8: .* byte 0xff"),
        ("x.csv", HEADER + b"c,\xff\n", "line 3 must be text in UTF-8: .* byte 0xff"),
        ("x.csv", HEADER + b"a,b,c\n", "cannot read .*x.csv: .* in line 3"),
        ("x.jsonl", THREE + b'{"query": \n' + THREE, r"line 4 is not JSON: Expecting value \(character 1.\)"),
        ("x.jsonl", THREE + b'{"query": ' + b"9" * 5000 + b"}\n", "line 4 is JSON that cannot be read: .*digits"),
        ("x.jsonl", THREE + b'{"query": "\\ud800"}\n', "line 4 must hold texts, but half of a pair of surrogates"),
        ("x.jsonl", THREE + b"5\n", "line 4 must be an object of columns, got 5"),
        ("x.parquet", b"PAR1 and no more", "cannot read .*x.parquet"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}|{message}"):
        read_source(str(tmp_path / name), hub=None, part=None)
    assert "Failed to" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "row", "message"),
    [
        ("metamathqa", {"query": 1}, "query must be a text, got 1"),
        ("metamathqa", {"response": ["a"]}, r"response must be a text, got \['a'\]"),
        ("metamathqa", {"response": {"a": 1}}, "response must be a text, got {'a': 1}"),
        ("text", {"text": 1.5}, "text must be a text, got 1.5"),
        ("alpaca", {"instruction": "a", "input": False, "output": "b"}, "input must be a text, got False"),
        ("openorca", {"question": "a", "system_prompt": [], "response": "b"}, r"system_prompt must be a text, got \["),
        ("wizardlm", {"conversations": "a"}, "conversations must be a list of turns, got 'a'"),
        ("wizardlm", {"conversations": ["a"]}, "conversations must hold turns with from and value, got 'a'"),
        ("wizardlm", {"conversations": [{"from": "gpt", "value": 5}]}, "value must be a text, got 5"),
        ("wizardlm", {"conversations": [{"from": 3, "value": "a"}]}, "from must be a text, got 3"),
        ("arc", {"question": "a", "choices": "b", "answerKey": "A"}, "choices must be an object, got 'b'"),
        ("arc", {"question": "a", "choices": {"label": "A", "text": ["b"]}, "answerKey": "A"}, "label must be a list"),
        ("arc", {"question": "a", "choices": {"label": [1], "text": ["b"]}, "answerKey": "A"},
         r"label of choices must be a text for each choice, got \[1\]"),
        ("arc", {"question": "a", "choices": {"label": ["A", "B"], "text": ["b"]}, "answerKey": "A"},
         r"text of choices must be a text for each choice, got \['b'\]"),
    ],
)  # fmt: skip
def test_columns_that_hold_no_texts(recipe, row, message, tmp_path):
    good = {**ROWS[0], "text": "a"} if recipe in ("metamathqa", "text") else {}
    (tmp_path / "x.jsonl").write_bytes(lines(*[good] * (9 if good else 0), *[{**good, **row}] * 3))
    with pytest.raises(ValueError, match=f"^rows of {recipe} in .*x.jsonl: {message}"):
        load(DataSettings(recipe=recipe, path=str(tmp_path / "x.jsonl"), train_examples=None, eval_examples=1))


@pytest.mark.parametrize(
    "text", ['{"query":\n"a"\n}\n', '{"query": "a"} {"query": "a"}', ' \n[{"query": "a"}]', '{"query": "a"}\r\n']
)
def test_other_layouts_of_json(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    assert set(read_source(str(tmp_path / "x.json"), hub=None, part=None)["train"]["query"]) == {"a"}


def test_a_line_of_20_megabytes(tmp_path):
    long = {"query": "long?", "response": "x" * 20_000_000}
    (tmp_path / "x.jsonl").write_bytes(lines(*ROWS, long))
    assert len(read_source(str(tmp_path / "x.jsonl"), hub=None, part=None)["train"][6]["response"]) == 20_000_000


@pytest.mark.parametrize("name", ["x[1]", "x*?", "[!a]"])
def test_names_that_look_like_patterns(name, tmp_path):
    (tmp_path / name).mkdir()
    for split, count in (("train", 5), ("test", 2)):
        (tmp_path / name / f"{split} {name}.jsonl").write_bytes(lines(*ROWS[:count]))
    found = read_source(str(tmp_path / name), hub=None, part=None)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "test": 2}
    found = read_source(str(tmp_path / name / f"test {name}.jsonl"), hub=None, part=None)
    assert found["train"]["query"] == ["0?", "1?"]


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_in_the_folder_leads_to_no_other_files(card, tmp_path):
    secret, folder = tmp_path / "secret.jsonl", tmp_path / "data"
    secret.write_bytes(lines({"query": "secret?", "response": "secret"}))
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines(*ROWS))
    fields = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {secret}\n"
    (folder / card).write_text(f"---\n{fields}---\n" if card == "README.md" else fields)
    assert read_source(str(folder), hub=None, part=None)["train"]["query"] == [row["query"] for row in ROWS]


def test_files_of_two_types_are_not_chosen_from(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(THREE)
    datasets.Dataset.from_list(ROWS).to_csv(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=r"data.path must hold files of one type, got .*a.jsonl and .*b.csv"):
        read_source(str(tmp_path), hub=None, part=None)


@pytest.mark.parametrize("saved", [True, False])
def test_columns_of_bytes_that_are_not_utf8(saved, tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 4, pa.array([b"a", b"\xff", b"c", b"d"]).buffers())
    table = pa.table({"query": texts, "response": texts})
    if saved:
        datasets.Dataset(table).save_to_disk(tmp_path / "x")
    else:
        pq.write_table(table, tmp_path / "x.parquet")
    path = str(tmp_path / ("x" if saved else "x.parquet"))
    with pytest.raises(ValueError, match=f"rows of metamathqa in {path} must be texts in UTF-8: .* byte 0xff"):
        load(DataSettings(recipe="metamathqa", path=path, train_examples=None, eval_examples=1))


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_saved_data_whose_description_is_nested_too_deeply(name, tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "x")
    (tmp_path / "x" / name).write_text('{"a":' * DEEP)
    with pytest.raises(ValueError, match=r"cannot read .*x: "):
        read_source(str(tmp_path / "x"), hub=None, part=None)


def test_published_texts_that_are_not_in_utf8(tmp_path):
    (tmp_path / "interpolate").mkdir()
    (tmp_path / "interpolate" / "algebra__x.txt").write_bytes(b"a\nb\nc \xff\nd\n")
    with pytest.raises(ValueError, match=r"algebra__x.txt, line 3 must be text in UTF-8"):
        load(DataSettings(path=str(tmp_path)))
