"""What counts as a change, and what does not."""

import os

import pytest

from stepdown.plan.fingerprints import (
    code_files,
    code_hash,
    fingerprint,
    folder_fingerprint,
    imported_names,
    model_fingerprint,
    text_fingerprint,
)

FILES = {
    "train.py": "import json\nfrom package import room\n",
    "other.py": "import package.room.lamp\n",
    "package/__init__.py": "",
    "package/errors.py": "import os\n",
    "package/room/__init__.py": "from .. import errors\nfrom .table import legs\n",
    "package/room/table.py": "from ..errors import os\n\nlegs = 4\n",
    "package/room/lamp.py": "def light():\n    from .table import legs\n",
    "package/alone.py": "",
}


@pytest.fixture
def scripts(tmp_path_factory):
    """A folder of scripts of its own: what was parsed once is remembered by its path."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_files_are_those_imported_however_it_is_written(scripts):
    room = ["package/__init__.py", "package/errors.py", "package/room/__init__.py", "package/room/table.py"]
    assert [str(file.relative_to(scripts)) for file in code_files(scripts, "train.py")] == [*room, "train.py"]
    files = [str(file.relative_to(scripts)) for file in code_files(scripts, "other.py")]
    assert files == sorted(["other.py", "package/room/lamp.py", *room])


def test_names_start_at_the_top(scripts):
    names = imported_names(scripts, scripts / "package/room/table.py")
    assert names == {("package", "errors"), ("package", "errors", "os")}


@pytest.mark.parametrize(
    ("file", "text", "changes"),
    [
        ("package/room/table.py", "from ..errors import os\n\n\nlegs = 4  # as most have\n", False),
        ("package/room/table.py", "from ..errors import os\n\nlegs = 3\n", True),
        ("package/alone.py", "lonely = True\n", False),
    ],
)
def test_code_counts_as_parsed_where_it_is_imported(scripts, tmp_path, file, text, changes):
    before = code_hash(scripts, "train.py")
    # At another place, where nothing has been parsed: where a project lies does not count either.
    moved = scripts.rename(tmp_path / "moved")
    (moved / file).write_text(text)
    assert (code_hash(moved, "train.py") != before) == changes


def test_content_counts_and_dates_do_not(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(bytes(1000))
    os.utime(second, (1, 1))
    assert fingerprint(first) == fingerprint(second)
    third = tmp_path / "third"
    third.write_bytes(bytes(999) + b"1")
    assert fingerprint(third) != fingerprint(first)


def test_a_large_file_is_sampled_and_its_size_counts(tmp_path):
    size = (1 << 16) * 300
    for name, length in (("large", size), ("larger", size + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(length)
    assert fingerprint(tmp_path / "large") != fingerprint(tmp_path / "larger")


def test_of_a_model_everything_but_its_prose(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    assert [line.split()[0] for line in model_fingerprint(str(tmp_path))] == ["config.json", "model.safetensors"]
    assert model_fingerprint("someone/on-a-hub") == []


def test_of_texts_the_files_that_are_read(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    a, b = (str(tmp_path / name) for name in ("a.txt", "b.txt"))
    assert text_fingerprint(["pydoc", a], ("train",)) == [fingerprint(tmp_path / "a.txt")]
    assert text_fingerprint([{"train": a, "test": b}], ("test",)) == [fingerprint(tmp_path / "b.txt")]


def test_of_a_folder_all_that_is_in_it(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/task.yaml").write_text("task: mine")
    assert folder_fingerprint(str(tmp_path)) == [fingerprint(tmp_path / "below/task.yaml")]
    assert folder_fingerprint(None) == []
