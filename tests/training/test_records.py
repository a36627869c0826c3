"""The record of a run: what is added is found again, also by the next process, and what does not fit is refused."""

import dataclasses
import json

import pytest

from balora_jax.training import Config, ConfigError, RunError, TrainingSettings
from balora_jax.training.fields import with_fields
from balora_jax.training.records import RunDirectory, environment, parse_line

MEMBERS = {f"lora-seed={seed}": with_fields(Config(name="x"), {"seed": seed}) for seed in (0, 1)}
STEPS = 4


def more(steps, **fields):
    changes = {"training.steps": steps} | fields
    return {name: with_fields(config, changes) for name, config in MEMBERS.items()}


def train(member, step, **values):
    return {"kind": "train", "population": "lora", "member": member, "step": step} | values


def whole_record(steps=STEPS, eval_every=2):
    """All that a population records up to its last step."""
    places = [("evaluation", step) for step in range(0, steps + 1, eval_every)]
    places += [("train", step) for step in range(1, steps + 1)] + [("result", steps)]
    return [train(member, step, kind=kind) for member in MEMBERS for kind, step in places]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def opened(folder):
    """Opens the run directory; the one that was open before is closed."""
    directories = []

    def open_again(members=MEMBERS):
        if directories:
            directories[-1].close()
        directories.append(RunDirectory(folder, members))
        return directories[-1]

    yield open_again
    for directory in directories:
        directory.close()


def test_what_is_added_is_found_by_the_next_process(opened, folder):
    lines = [train("lora-seed=0", 1, loss=0.1), train("lora-seed=1", 1, loss=float("inf"))]
    opened().append(lines)
    directory = opened()
    assert directory.records == lines
    assert directory.of("train", member="lora-seed=1", step=1) == lines[1:]
    assert directory.of("evaluation") == []
    assert json.loads((folder / "config.json").read_text())["lora-seed=1"]["seed"] == 1
    starts = json.loads((folder / "environment.json").read_text())
    assert len(starts) == 2, "one for each process"
    assert directory.started == starts[0]["time"]


def test_a_log_gets_what_is_added_and_is_closed(opened):
    class Log:
        seen, closed = (), False

        def write(self, records):
            self.seen += tuple(records)

        def close(self):
            self.closed = True

    directory, log = opened(), Log()
    directory.append([train("lora-seed=0", 1)])
    directory.watch(log)
    directory.append([train("lora-seed=0", 2)])
    directory.close()
    assert [record["step"] for record in log.seen] == [2]
    assert log.closed


def test_a_population_goes_back_to_a_step(opened):
    directory = opened()
    other = train("lora-seed=0", 3) | {"population": "dora"}
    directory.append([*(train("lora-seed=0", step) for step in range(1, 5)), other])
    directory.rewind("lora", 2)
    kept = [train("lora-seed=0", 1), train("lora-seed=0", 2), other]
    assert directory.records == kept
    assert opened().records == kept, "on the disk too"
    directory.forget(directory.of("evaluation"))


def test_answers_take_the_place_of_those_of_their_population(opened, folder):
    directory = opened()
    for population, text in (("lora", "1"), ("dora", "2"), ("lora", "3")):
        directory.write_lines("answers.jsonl", population, [{"member": "m", "answer": text}])
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(line["population"], line["answer"]) for line in lines] == [("dora", "2"), ("lora", "3")]
    (folder / "answers.jsonl").write_text('{"population": "dora"}\n5\n')
    with pytest.raises(RunError, match=r"answers.jsonl, line 2 is none of its kind .*; delete it to go on"):
        directory.write_lines("answers.jsonl", "lora", [])


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (("train", 3), "lacks records of lora up to its last step 4: the train record of step 3 of lora-seed=1"),
        (("evaluation", 2), "the evaluation record of step 2 of lora-seed=1"),
        (("result", 4), "the result record of step 4 of lora-seed=1"),
    ],
)
def test_a_record_that_lacks_something_or_holds_it_twice(lost, said, opened):
    record = whole_record()
    (gone,) = (line for line in record if (line["kind"], line["step"], line["member"]) == (*lost, "lora-seed=1"))
    directory = opened()

    def check(checkpoint=None):
        settings = TrainingSettings(steps=STEPS, eval_every=2)
        directory.check_complete("lora", MEMBERS, settings, checkpoint=checkpoint)

    directory.append([line for line in record if line is not gone])
    with pytest.raises(RunError, match=said):
        check()
    check(checkpoint=lost[1] - 1)
    directory.append([gone])
    check()
    directory.append([gone])
    with pytest.raises(RunError, match="holds twice records of lora"):
        check()


def test_one_process_at_a_time(opened, folder):
    directory = opened()
    with pytest.raises(RunError, match=r"another process is working in .*; wait for it or choose another --output"):
        RunDirectory(folder, MEMBERS)
    directory.close()
    opened()


def test_a_run_that_goes_on_to_more_steps_forgets_its_end(opened):
    directory = opened(more(STEPS, **{"training.eval_every": 3}))
    directory.append(whole_record(eval_every=3) + [train(name, STEPS, kind="evaluation") for name in MEMBERS])
    before = directory.records
    found = opened(more(6, **{"training.eval_every": 3})).records
    assert found == [line for line in before if line["kind"] == "train" or line["step"] in (0, 3)]
    with pytest.raises(ConfigError, match=r"holds a run with training.steps = 6, and not 5, in lora-seed=0"):
        opened(more(5, **{"training.eval_every": 3}))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"optimizer.schedule": "cosine"}, "the learning rate falls to zero at its end"),
        ({"method": "adalora"}, "the phases of adalora are shares of it"),
    ],
)
def test_a_run_whose_first_steps_depend_on_their_number_does_not_go_on(fields, why, opened):
    opened(more(4, **fields))
    with pytest.raises(ConfigError, match=f"holds a run of 4 steps, which cannot go on to 6: {why}"):
        opened(more(6, **fields))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (more(1000, **{"adapter.rank": 2}), r"holds a run with adapter.rank = \d+, and not 2, in lora-seed=0"),
        (dict(list(MEMBERS.items())[:1]), "holds a run with other members in lora-seed=1"),
    ],
)
def test_a_run_of_another_config_is_refused(members, said, opened):
    opened()
    with pytest.raises(ConfigError, match=f"{said}; choose another --output, or delete the folder"):
        opened(members)


def test_folders_that_are_no_run_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="must be a folder, but it is a file"):
        RunDirectory(tmp_path / "file", MEMBERS)
    with pytest.raises(ConfigError, match=r"holds files but no config.json; choose an empty folder"):
        RunDirectory(tmp_path, MEMBERS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "and left as they are"


def test_a_line_is_json_or_says_what_it_is():
    assert parse_line('{"a": [1]}') == {"a": [1]}
    for line, said in (("{", "not JSON"), ("[" * 200, "nested more than 100 deep")):
        with pytest.raises(ValueError, match=said):
            parse_line(line)


def test_the_environment_names_what_a_result_depends_on():
    found = environment()
    assert {"packages", "device", "commit", "uncommitted_changes", "command", "time", "python"} <= set(found)
    assert set(found["packages"]) >= {"balora-jax", "jax", "optax"}
    assert found == json.loads(json.dumps(found))


def test_a_config_is_recorded_as_it_is(opened, folder):
    opened()
    expected = {name: json.loads(json.dumps(dataclasses.asdict(config))) for name, config in MEMBERS.items()}
    for config in expected.values():
        del config["parallel"]  # no part of what is computed
    assert json.loads((folder / "config.json").read_text()) == expected
