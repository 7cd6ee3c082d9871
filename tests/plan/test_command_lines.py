"""The words of command lines."""

from dataclasses import replace

import pytest

from stepdown.plan.command_lines import flags, one_schedule_options, passing_on_options, recovery_options, text_words
from stepdown.plan.schedule import Row

RECOVERY = {
    "method": "full",
    "text": "pydoc",
    "learning_rate": 0.001,
    "one_schedule": True,
    "distill": {"weight": 0.9, "temperature": 1.0},
    "lora": {"rank": 4, "keep_adapter": True},
}
ROW = Row(1, "0.9", "0.1", "0", 1, "0.1", "0")
SCHEDULE = [replace(ROW, iteration=number) for number in (1, 2, 3)]


def test_flags():
    options = {"batch_size": 4, "bf16": False, "sharded": True, "tokens": None, "targets": ["q", "v"], "empty": []}
    assert flags(options) == ["--batch-size", "4", "--no-bf16", "--sharded", "--targets", "q", "v", "--empty"]


def test_texts_by_name_path_or_split():
    by_split = {"train": "a {x}.txt", "valid": "b.txt", "test": "c.txt"}
    words = text_words(["pydoc", "my text.txt", by_split], ("train", "valid"))
    assert words == ["pydoc", "my text.txt", '{"train": "a {x}.txt", "valid": "b.txt"}']


def test_who_an_option_belongs_to_is_told_it():
    plain = {"method": "full", "learning_rate": 0.001}
    assert recovery_options(RECOVERY, "results/iter1", None, {}) == plain
    distilled = recovery_options(RECOVERY, "results/iter1", "results/iter0/model", {})
    teacher = {"distill_weight": 0.9, "distill_temperature": 1.0, "teacher": "results/iter0/model"}
    assert distilled == plain | teacher
    lora = recovery_options(RECOVERY | {"method": "lora"}, "results/iter1", None, {"warmup_steps": 0})
    own = {"method": "lora", "warmup_steps": 0, "lora_rank": 4, "output_adapter": "results/iter1/adapter"}
    assert lora == plain | own


def test_without_epochs_only_moments_are_handed_on():
    moments = {"optimizer": "a", "output_optimizer": "b"}
    told = passing_on_options(RECOVERY | {"sequence_length": 8}, {"warmup_steps": 0, **moments})
    assert told == {"sequence_length": 8, **moments}


@pytest.mark.parametrize(
    ("number", "schedule", "before", "after"),
    [(1, "constant", None, "iter1"), (2, "constant", "iter1", "iter2"), (3, None, "iter2", None)],
)
def test_one_schedule_goes_over_the_iterations(number, schedule, before, after):
    options = one_schedule_options(SCHEDULE, SCHEDULE[number - 1], "full", "results")
    assert options.get("learning_rate_schedule") == schedule
    assert options.get("warmup_steps") == (0 if before else None)
    for option, step in (("optimizer", before), ("output_optimizer", after)):
        assert options.get(option) == (f"results/{step}/optimizer.safetensors" if step else None)


def test_what_was_not_trained_hands_nothing_on():
    untrained = [replace(SCHEDULE[0], epochs=0), *SCHEDULE[1:]]
    assert "optimizer" not in one_schedule_options(untrained, untrained[1], "full", "results")
    lora = one_schedule_options(SCHEDULE, SCHEDULE[1], "lora", "results")
    assert lora == {"learning_rate_schedule": "constant"}
