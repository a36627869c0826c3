"""Data sets by name, from small files of the published formats."""

import collections
import dataclasses

import datasets
import numpy as np
import published_rows as published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_rows import rows, write

from balora_jax.data import cache as cache_module
from balora_jax.data import recipes
from balora_jax.data.recipes import DataSettings, load
from balora_jax.data.scores import exact_match, same_final_answer

SETTINGS = DataSettings(modules=("numbers__gcd", "arithmetic__mul"), train_examples=20, eval_examples=6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "balora_jax"


def read(recipe, path, **settings):
    return load(DataSettings(**{"recipe": recipe, "path": str(path), "train_examples": None, **settings}))


def by_module(examples):
    return {name: list(examples["module"]).count(name) for name in set(examples["module"])}


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_generated():
    splits = load(SETTINGS)
    assert len(splits.train) == 20
    assert len(splits.evaluation) == 6
    assert set(splits.train["module"]) == set(SETTINGS.modules)
    assert not set(splits.train["prompt"]) & set(splits.evaluation["prompt"])
    assert all(prompt.endswith(" ") for prompt in splits.train["prompt"])
    assert splits.score is exact_match


@pytest.fixture
def mathematics(tmp_path):
    for split in ("train-easy", "train-medium", "train-hard", "interpolate"):
        (tmp_path / split).mkdir()
        for module in ("algebra__linear_1d", "numbers__gcd"):
            lines = [line for i in range(9) for line in (f"{split} question {i} of {module}?", str(i))]
            (tmp_path / split / f"{module}.txt").write_text("\n".join(lines) + "\n")
    with (tmp_path / "train-easy" / "numbers__gcd.txt").open() as file:
        first = file.readline()
    held_out = tmp_path / "interpolate" / "numbers__gcd.txt"
    held_out.write_text(first + "7\n" + held_out.read_text())
    return tmp_path


def test_published_files_by_the_same_name(mathematics):
    settings = DataSettings(path=str(mathematics), train_examples=30, eval_examples=8)
    splits = load(settings)
    assert set(splits.train["module"]) == {"algebra__linear_1d", "numbers__gcd"}
    assert len(splits.evaluation) == 8
    assert len(splits.train) == 29, "the question that is also an evaluation question is left out"
    assert splits.left_out == {"training examples that are also evaluation examples": 1}
    assert not set(splits.train["prompt"]) & set(splits.evaluation["prompt"])
    one = load(dataclasses.replace(settings, modules=("numbers__gcd",)))
    assert set(one.train["module"]) == {"numbers__gcd"}
    asked = load(dataclasses.replace(settings, recipe="dm_mathematics"))
    assert asked.train[0]["prompt"] == f"Question: {splits.train[0]['prompt'].strip()}\nAnswer:"
    assert asked.train[0]["answer"] == f" {splits.train[0]['answer']}"
    everything = load(dataclasses.replace(settings, train_examples=None, eval_examples=None))
    assert (len(everything.train), len(everything.evaluation)) == (2 * 3 * 9 - 1, 19)


@pytest.fixture
def many_files(tmp_path):
    """56 modules in four splits, and harder questions of some in a fifth; modules are letters."""
    names = [f"{first}{second}__x" for first in "abcdefgh" for second in "abcdefg"]
    folders = dict.fromkeys(("train-easy", "train-medium", "train-hard", "interpolate"), names)
    folders["extrapolate"] = ["aa__x_big", "ab__x_more_samples", "ab__x_y_longer"]
    for split, modules in folders.items():
        (tmp_path / split).mkdir()
        for module in modules:
            (tmp_path / split / f"{module}.txt").write_text("".join(f"{split} {module} {i}?\n{i}\n" for i in range(9)))
    return tmp_path


def test_as_many_examples_from_each_file(many_files):
    splits = read("dm_mathematics", many_files, train_examples=200, eval_examples=60)
    assert collections.Counter(by_module(splits.evaluation).values()) == {1: 52, 2: 4}
    questions = [prompt.split()[1:3] for prompt in splits.train["prompt"]]
    assert collections.Counter(collections.Counter(map(tuple, questions)).values()) == {1: 168 - 32, 2: 32}
    assert splits.left_out == {}
    splits = read("dm_mathematics", many_files, train_examples=100, eval_examples=40)
    assert splits.left_out == {
        "training files, as data.train_examples is below their number": 68,
        "evaluation files, as data.eval_examples is below their number": 16,
    }
    by_split = collections.Counter(prompt.split()[1] for prompt in splits.train["prompt"])
    assert set(by_split.values()) == {33, 34}, "what is over is spread over all"


def test_harder_questions_can_be_evaluated(many_files):
    for modules, expected in (
        ((), {"aa__x_big": 2, "ab__x_more_samples": 2, "ab__x_y_longer": 2}),
        (("ab__x",), {"ab__x_more_samples": 6}),
        (("aa__x", "ab__x"), {"aa__x_big": 3, "ab__x_more_samples": 3}),
    ):
        splits = read("dm_mathematics", many_files, eval_examples=6, eval_split="extrapolate", modules=modules)
        assert by_module(splits.evaluation) == expected
        assert set(splits.train["module"]) == (set(modules) or set(by_module(read("mathematics", many_files).train)))
    with pytest.raises(
        FileNotFoundError, match=r"no file .*extrapolate/ac__x\.txt for module 'ac__x'; .* holds aa__x_big"
    ):
        read("dm_mathematics", many_files, eval_split="extrapolate", modules=("ac__x",))
    with pytest.raises(FileNotFoundError, match=r"no folder .*/extrapolte; .* holds .*extrapolate"):
        read("dm_mathematics", many_files, eval_split="extrapolte")
    with pytest.raises(ValueError, match=r"data\.eval_split must be none of those for training, got 'train-hard'"):
        read("dm_mathematics", many_files, eval_split="train-hard")


@given(st.integers(0, 10**9), st.integers(1, 300))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_shares_are_equal_to_one_and_add_up(count, parts):
    shares = recipes._shares(count, parts)
    assert (len(shares), sum(shares)) == (parts, count)
    assert max(shares) - min(shares) <= 1


def test_what_is_too_long_is_said_with_the_modules_that_it_was_all_of():
    examples = datasets.Dataset.from_dict({"module": list("aabbc"), "answer": [""] * 5})
    every, some = np.arange(5), np.array([0, 0, 2, 3])  # two are pieces of one text

    def said(kept, what="evaluation", **settings):
        return recipes.check_lengths(DataSettings(length=7, **settings), examples, kept, what)

    assert said(every) == said(every, modules=("a", "b", "c")) == {}
    assert said(some) == {"evaluation examples of more than 7 tokens, all of c among them": 2}
    assert said(np.array([0, 2, 4]), "training") == {"training examples of more than 7 tokens": 2}
    assert said(some, modules=("a", "b")) == {"evaluation examples of more than 7 tokens, all of c among them": 2}
    with pytest.raises(
        ValueError, match=r"data\.modules: c has no training example of at most 7 tokens \(data\.length\)"
    ):
        said(some, "training", modules=("a", "c"))
    with pytest.raises(ValueError, match=r"data\.modules: d has no evaluation example among those drawn"):
        said(every, modules=("d",))


def test_published_files_are_read_once(mathematics, cache, monkeypatch):
    settings = DataSettings(path=str(mathematics), train_examples=30, eval_examples=8)
    first = load(settings)
    assert first.train.cache_files, "it lies on disk, and not in memory"
    monkeypatch.setattr(recipes, "read_file", lambda *arguments: pytest.fail("read again"))
    assert load(settings).train[:] == first.train[:]
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache.parent)
    file = mathematics / "train-easy" / "algebra__linear_1d.txt"
    file.write_text("Another?\n" + file.read_text().split("\n", 1)[1])
    assert load(settings).train[0]["prompt"] == "Another? ", "other content, other cache"
    file.write_text("Another?\n7\nAnd?\n")
    with pytest.raises(ValueError, match=r"linear_1d\.txt, line 3: a question without an answer"):
        load(settings)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    write(tmp_path / "rows.jsonl", rows(published.metamathqa, 6))
    datasets.Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path)).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "taken")
    for path, message in (
        ("saved", "the cache .*taken/balora_jax cannot be written .*HF_DATASETS_CACHE"),
        ("rows.jsonl", "cannot read .*rows.jsonl, or write its copy to the cache .*taken .*HF_DATASETS_CACHE"),
    ):
        with pytest.raises(ValueError, match=message):
            load(DataSettings(recipe="metamathqa", path=str(tmp_path / path), eval_examples=1))


FIRST = {
    "alpaca": conversation(("user", "Name 2 colours.\n\nwarm ones"), ("assistant", "colour 2")),
    "codefeedback": conversation(("user", "write 2"), ("assistant", "print(2)")),
    "openhermes": conversation(("user", "hello 3\n\nand?"), ("assistant", "bye 3")),
    "openhermes_v2": conversation(
        ("system", "be kind"), ("user", "hello 2"), ("assistant", "hi"), ("user", "and?"), ("assistant", "bye 2")
    ),
    "openorca": conversation(("system", "think"), ("user", "why 3?"), ("assistant", "so 3")),
    "wizardlm": conversation(("user", "do 2"), ("assistant", "done 2")),
    "wizardlm_v2": conversation(("user", "do 2"), ("assistant", "done 2")),
}


@pytest.mark.parametrize("name", FIRST)
def test_instruction_sets_are_conversations(name, tmp_path):
    recipe = name.removesuffix("_v2")
    file = write(tmp_path / "some name.jsonl", rows(getattr(published, name), 20))
    splits = read(recipe, file, eval_examples=5)
    assert splits.score is None
    everyone = [*splits.train["messages"], *splits.evaluation["messages"]]
    assert FIRST[name] in everyone
    assert by_module(splits.train) == {recipe: len(splits.train)}
    unusable = {"alpaca": 1, "openhermes_v2": 2}.get(name, 0)
    assert sum(splits.left_out.values()) == unusable
    assert all(what.endswith("examples without a question or an answer") for what in splits.left_out)
    assert len(everyone) == 20 - unusable
    asked = [[turn["content"] for turn in messages if turn["role"] != "assistant"] for messages in everyone]
    assert len(set(map(tuple, asked))) == len(everyone), "no question is in both splits"


def test_openorca_without_a_system_prompt(tmp_path):
    file = write(tmp_path / "x.json", rows(published.openorca, 4))
    splits = read("openorca", file, eval_examples=1)
    found = [[turn["role"] for turn in m] for m in (*splits.train["messages"], *splits.evaluation["messages"])]
    assert sorted(found) == sorted([["system", "user", "assistant"], ["user", "assistant"]] * 2)


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("gsm8k", "Question: What is 5 + 2?\nAnswer:", " 5 + 2 = <<5+2=7>>7\n#### 7"),
        ("metamathqa", "Question: 5 + 1?\nAnswer:", " add one\nThe answer is: 6"),
    ],
)
def test_mathematical_questions(name, prompt, answer, tmp_path):
    splits = read(name, write(tmp_path / "x.csv", rows(getattr(published, name), 20)), eval_examples=5)
    examples = {e["prompt"]: e["answer"] for part in (splits.train, splits.evaluation) for e in part}
    assert len(examples) == 20
    assert examples[prompt] == answer
    assert splits.score is same_final_answer


def test_wikitext_is_lines(tmp_path):
    for split, count in (("train", 30), ("validation", 9), ("test", 3)):
        file = tmp_path / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        write(file, rows(published.wikitext, count))
    write(tmp_path / "wikitext-103-raw-v1" / "train-00000-of-00001.parquet", rows(published.wikitext, 300))
    splits = read("wikitext", tmp_path)
    unusable = "{} examples without a question or an answer"
    assert splits.left_out == {unusable.format("training"): 10, unusable.format("evaluation"): 3}
    assert set(splits.train["prompt"]) == {""}
    assert sorted(splits.evaluation["answer"]) == ["= Heading ="] * 3 + [f"line {i} of a page" for i in (2, 5, 8)]
    assert list(splits.train["answer"]).count("= Heading =") == 10, "headings recur"
    assert splits.score is None


@pytest.mark.parametrize(
    ("name", "expected"), [("text", "document 4"), ("arxiv", "we show 4 .\nthe proof is simple .")]
)
def test_documents_are_learned_whole(name, expected, tmp_path):
    splits = read(name, write(tmp_path / "x.parquet", rows(getattr(published, name), 12)), eval_examples=3)
    assert list(splits.left_out.values()) == [1]
    assert expected in [*splits.train["answer"], *splits.evaluation["answer"]]
    assert set(splits.train["prompt"]) == set(splits.evaluation["prompt"]) == {""}
    assert splits.score is None


def test_arc_has_both_parts_as_modules(tmp_path):
    for part, start in (("ARC-Easy", 0), ("ARC-Challenge", 100)):
        write(tmp_path / part / "train-00000-of-00001.parquet", rows(published.arc, 12, start))
        write(tmp_path / part / "test-00000-of-00001.parquet", rows(published.arc, 5, start + 20))
        write(tmp_path / part / "validation-00000-of-00001.parquet", rows(published.arc, 4, start + 30))
    splits = read("arc", tmp_path)
    assert by_module(splits.train) == {"ARC-Easy": 12, "ARC-Challenge": 12}
    assert by_module(splits.evaluation) == {"ARC-Easy": 4, "ARC-Challenge": 4}
    example = next(e for e in splits.evaluation if "is 31?" in e["prompt"])
    text = "Question: Which is 31?\nA. thing A\nB. thing B\nC. thing C\nD. thing D\nAnswer:"
    assert (example["prompt"], example["answer"]) == (text, " B")
    assert example["choices"] == [" A", " B", " C", " D"]
    assert next(e for e in splits.evaluation if "is 130?" in e["prompt"])["choices"] == [" 1", " 2", " 3"]
    assert splits.score is exact_match
    easy = read("arc", tmp_path, modules=("ARC-Easy",), train_examples=3)
    assert by_module(easy.train) == {"ARC-Easy": 3}
    assert by_module(read("arc", tmp_path / "ARC-Easy").train) == {"arc": 12}
    limited = read("arc", tmp_path, train_examples=5, eval_examples=2)
    assert (by_module(limited.train), by_module(limited.evaluation)) == (
        {"ARC-Challenge": 2, "ARC-Easy": 3},
        {"ARC-Easy": 1, "ARC-Challenge": 1},
    )


def saved_to_disk(folder, content):
    datasets.Dataset.from_list(content).save_to_disk(folder)
    return folder


def saved_with_splits(folder, content):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(content)}).save_to_disk(folder)
    return folder


PLACES = {
    "parquet": lambda folder, content: write(folder / "x.parquet", content),
    "json": lambda folder, content: write(folder / "x.json", content),
    "jsonl": lambda folder, content: write(folder / "x.jsonl", content),
    "csv": lambda folder, content: write(folder / "x.csv", content),
    "folder": lambda folder, content: write(folder / "MetaMathQA-395K.json", content).parent,
    "repository": lambda folder, content: write(folder / "data/train-00000-of-00001.parquet", content).parents[1],
    "saved to disk": saved_to_disk,
    "saved with splits": saved_with_splits,
}


@pytest.mark.parametrize("kind", PLACES)
def test_the_same_data_from_every_place(kind, tmp_path):
    path = PLACES[kind](tmp_path / "data", rows(published.metamathqa, 12))
    splits = read("metamathqa", path, eval_examples=3)
    expected = read("metamathqa", PLACES["jsonl"](tmp_path / "other", rows(published.metamathqa, 12)), eval_examples=3)
    assert splits.train[:] == expected.train[:]
    assert splits.evaluation[:] == expected.evaluation[:]


def test_seed_decides_what_is_held_out(tmp_path):
    file = write(tmp_path / "x.jsonl", rows(published.metamathqa, 40))
    one = read("metamathqa", file, eval_examples=8)
    fewer = read("metamathqa", file, eval_examples=8, train_examples=10)
    assert (len(one.train), len(one.evaluation), len(fewer.train)) == (32, 8, 10)
    assert fewer.evaluation[:] == one.evaluation[:], "however much is trained on"
    assert not set(one.train["prompt"]) & set(one.evaluation["prompt"])
    other = read("metamathqa", file, eval_examples=8, seed=1)
    assert set(other.evaluation["prompt"]) != set(one.evaluation["prompt"])


def test_repeated_questions_are_not_in_both_splits(tmp_path):
    file = write(tmp_path / "x.jsonl", rows(published.wizardlm, 10) * 3)
    splits = read("wizardlm", file, eval_examples=6)
    asked, held_out = (
        {messages[0]["content"] for messages in part["messages"]} for part in (splits.train, splits.evaluation)
    )
    assert asked
    assert not asked & held_out
    assert len(splits.train) + splits.left_out["training examples that are also evaluation examples"] == 24


def test_texts_in_csv_that_look_like_missing_values(tmp_path):
    texts = ["None", "NA", "nan", "null", ""]
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "train.csv"
    write(file, [{"instruction": text, "input": "", "output": "x"} for text in texts] * 2)
    for place in (file, file.parent):
        splits = read("alpaca", place, eval_examples=4)
        asked = {messages[0]["content"] for messages in [*splits.train["messages"], *splits.evaluation["messages"]]}
        assert asked == set(texts[:-1]), "but for the empty one"


def test_own_splits_are_kept(tmp_path):
    write(tmp_path / "main" / "train-00000-of-00001.parquet", rows(published.gsm8k, 20))
    write(tmp_path / "main" / "test-00000-of-00001.parquet", rows(published.gsm8k, 9, 50))
    write(tmp_path / "socratic" / "train-00000-of-00001.parquet", rows(published.gsm8k, 99, 100))
    splits = read("gsm8k", tmp_path, eval_examples=None)
    assert (len(splits.train), len(splits.evaluation)) == (20, 9)
    assert all("What is 5" in prompt for prompt in splits.evaluation["prompt"])
    assert len(read("gsm8k", tmp_path, eval_examples=4).evaluation) == 4


def test_the_split_to_evaluate_on_can_be_chosen(tmp_path):
    for split, start in (("train", 0), ("validation", 50), ("test", 70)):
        write(tmp_path / "main" / f"{split}-00000-of-00001.parquet", rows(published.gsm8k, 9, start))
    for split, digit in ((None, 5), ("validation", 5), ("test", 7)):
        splits = read("gsm8k", tmp_path, eval_examples=None, eval_split=split)
        assert len(splits.evaluation) == 9
        assert all(f"What is {digit}" in prompt for prompt in splits.evaluation["prompt"])
    for wrong in ("train", "tests"):
        with pytest.raises(ValueError, match=rf"eval_split must be a split .*\(.*test.*\), got '{wrong}'"):
            read("gsm8k", tmp_path, eval_split=wrong)
    with pytest.raises(ValueError, match="eval_split must be None for mathematics, got 'test'"):
        load(DataSettings(eval_split="test"))


def files_in(folder):
    return dict(collections.Counter(file.suffix for file in folder.iterdir()))


def test_work_is_done_once(tmp_path, cache, monkeypatch):
    calls = []

    def counted(row):
        calls.append(row)
        return published_reader(row)

    published_reader = recipes.RECIPES["metamathqa"].read
    counted.__name__ = published_reader.__name__
    recipe = dataclasses.replace(recipes.RECIPES["metamathqa"], read=counted)
    monkeypatch.setitem(recipes.RECIPES, "metamathqa", recipe)
    file = write(tmp_path / "x.jsonl", rows(published.metamathqa, 12))
    one = read("metamathqa", file, eval_examples=3)
    assert len(calls) == 12
    assert files_in(cache) == {".arrow": 2, ".sha256": 2}
    assert read("metamathqa", file, eval_examples=3).train[:] == one.train[:]
    assert len(calls) == 12, "the second time nothing is read"
    write(file, rows(published.metamathqa, 12, 100))
    assert read("metamathqa", file, eval_examples=3).train[:] != one.train[:], "other content, other cache"
    assert len(calls) == 24


def test_interrupted_work_goes_on_at_its_shard(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_SHARD", 5)
    seen = []

    def doubled(batch):
        if 17 in batch["x"] and 17 not in seen:
            seen.append(17)
            raise RuntimeError("killed")
        seen.extend(batch["x"])
        return {"y": [2 * x for x in batch["x"] if x != 3]}

    def work():
        features = datasets.Features({"y": datasets.Value("int32")})
        return cache_module.mapped(numbers, doubled, features=features, key="doubled", description="Doubling")

    write(tmp_path / "x.jsonl", [{"x": x} for x in range(22)])
    numbers = datasets.load_dataset("json", data_files=str(tmp_path / "x.jsonl"), split="train")
    with pytest.raises(RuntimeError, match="killed"):
        work()
    assert files_in(cache) == {".arrow": 3, ".sha256": 3}
    assert work()["y"][:] == [2 * x for x in range(22) if x != 3]
    assert seen == [*range(15), 17, *range(15, 22)]
    file = sorted(cache.glob("*.arrow"))[2]
    whole = file.read_bytes()
    for damaged in (whole[:-40], whole[: len(whole) // 2], b"", whole[:-40] + 32 * b"x" + whole[-8:]):
        file.write_bytes(damaged)
        assert work()["y"][:] == [2 * x for x in range(22) if x != 3]
        assert file.read_bytes() == whole
    assert len(seen) - 23 in (4 * 5, 4 * 2), "only what is damaged is done again"
    numbers = numbers.select([])
    assert len(work()) == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"recipe": "mathmatics"}, ValueError, "did you mean 'mathematics'"),
        ({"recipe": "mathematics", "path": None}, ValueError, "must be numbers where examples are generated"),
        ({"recipe": "dm_mathematics", "path": None}, ValueError, "data.path must be the folder"),
        ({"recipe": "text", "path": None}, ValueError, "data.path must be a file or a folder"),
        ({"path": "nowhere"}, FileNotFoundError, "there is no file or folder nowhere"),
        ({"path": "text.txt"}, ValueError, r"data.path must be of one of the types .parquet, .*text\.txt"),
        ({"path": "empty"}, FileNotFoundError, "must hold files of the types .* it holds notes.md"),
        ({"path": "broken.parquet"}, ValueError, "cannot read broken.parquet"),
        ({"path": "broken.json"}, ValueError, "broken.json is not JSON"),
        ({"path": "void.jsonl"}, ValueError, r"cannot read void\.jsonl: a file or a split of it is empty"),
        ({"path": "cut"}, ValueError, "cannot read cut: "),
        ({"path": "nothing"}, ValueError, "cannot read nothing: a file or a split of it is empty"),
        ({"path": "rows.jsonl", "eval_examples": None}, ValueError, r"number below that of the rows \(12\).*got None"),
        ({"path": "rows.jsonl", "eval_examples": 12}, ValueError, r"number below that of the rows \(12\).*got 12"),
        ({"path": "rows.jsonl", "recipe": "alpaca"}, ValueError, "must have the column 'instruction', got .*query"),
        ({"path": "rows.jsonl", "modules": ("GSM",)}, ValueError, "must be empty for metamathqa, got 'GSM'"),
        ({"recipe": "arc", "modules": ("ARC-Easy", "ARC-Easy")}, ValueError, "each module once, got 'ARC-Easy' more"),
        ({"recipe": "arc", "modules": ("arc",)}, ValueError, "among ARC-Challenge, ARC-Easy for arc, got 'arc'"),
        ({"recipe": "arc", "path": "empty", "modules": ("ARC-Easy",)}, FileNotFoundError, "hold the folders ARC-Easy"),
        ({"recipe": "openhermes", "path": "turns.json"}, ValueError, "must be from one of system, human.* got 'tool'"),
        ({"recipe": "openhermes", "path": "flat.csv"}, ValueError, "conversations must be a list of turns, got 'he"),
        ({"recipe": "arc", "path": "arc.json"}, ValueError, "answerKey must be one of the labels A, B, got 'E'"),
        ({"recipe": "alpaca", "path": "silent.json"}, ValueError,
         "must have examples to train and to evaluate on, got 0 and 0; skipped: 2 training .*; skipped: 1 eval"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(settings, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "broken.json").write_text('[{"query": 1')
    (tmp_path / "void.jsonl").write_text("")
    some = datasets.Dataset.from_list(rows(published.metamathqa, 12))
    some.save_to_disk(tmp_path / "cut")
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-400])
    datasets.DatasetDict(train=some, validation=some.select([])).save_to_disk(tmp_path / "nothing")
    write(tmp_path / "rows.jsonl", rows(published.metamathqa, 12))
    write(tmp_path / "turns.json", [{"conversations": [{"from": "tool", "value": "1"}]}] * 3)
    write(tmp_path / "flat.csv", [{"conversations": "hello"}] * 3)
    write(tmp_path / "silent.json", [{"instruction": "a", "input": "", "output": ""}] * 3)
    write(tmp_path / "arc.json", [{**published.arc(1), "choices": {"text": ["a", "b"], "label": ["A", "B"]},
                                   "answerKey": "E"}] * 3)  # fmt: skip
    defaults = {"recipe": "metamathqa", "eval_examples": 1, "train_examples": None}
    with pytest.raises(error, match=message):
        load(DataSettings(**{**defaults, **settings}))


def test_missing_modules_of_mathematics(mathematics):
    with pytest.raises(FileNotFoundError, match="numbers__lcm"):
        load(DataSettings(path=str(mathematics), modules=("numbers__lcm",)))


def test_hub_out_of_reach_is_said(monkeypatch):
    def unreachable(*arguments, **keywords):
        assert (arguments, keywords) == (("openai/gsm8k",), {"name": "main"})
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cannot get openai/gsm8k from the Hub \(no route\); set data.path"):
        load(DataSettings(recipe="gsm8k"))


@pytest.mark.parametrize("recipe", sorted(set(recipes.RECIPES) - {"mathematics", "dm_mathematics", "text"}))
def test_recipes_without_a_path_ask_the_hub(recipe, monkeypatch):
    asked = []

    def hub(repository, name):
        asked.append((repository, name))
        return {"train": datasets.Dataset.from_list(rows(getattr(published, recipe), 12))}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    splits = load(DataSettings(recipe=recipe, eval_examples=3))
    row = recipes.RECIPES[recipe]
    assert asked == [(row.hub, part) for part in row.parts or [None]]
    assert set(splits.train.column_names) == set(splits.evaluation.column_names) == set(row.columns)
