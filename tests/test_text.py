"""Texts: what is read, how it is split, and which windows are cut from it."""

import itertools
import json
import logging
import random
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stepdown import text
from stepdown.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, none added."""
    return byte_tokenizer()


def byte_tokenizer(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = options.pop("post_processor", None) or processors.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **options)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# Files


@pytest.mark.parametrize("name", ["a.txt", "wiki.test.tokens", "a.md"])
def test_a_file_used_whole_is_its_text_unchanged(tmp_path, name):
    content = " \r\n = Title = \n\n\n odd\u2028ends\x0b \n no newline at the end"
    (tmp_path / name).write_bytes(content.encode())
    assert text.load_documents({"test": str(tmp_path / name)}, "test") == [content]


@settings(max_examples=30)
@given(lines=st.lists(st.text("ab\u2028", max_size=5).map(lambda line: f"x{line}\n"), min_size=30, max_size=60))
def test_the_parts_of_a_text_file_are_contiguous_whole_lines_in_proportion(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    path.write_bytes("".join(lines).encode())
    parts = [text.load_documents(str(path), split) for split in text.SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert "".join(part[0] for part in parts) == "".join(lines)
    assert all(part[0][-1] in "\n\u2028" for part in parts)
    shares = [len(part[0]) / len("".join(lines)) for part in parts]
    # A part begins at most one line (7 characters) after its bound.
    slack = 7 / len("".join(lines))
    assert 0.8 <= shares[0] < 0.8 + slack
    assert abs(shares[1] - 0.1) < slack
    assert shares[2] <= 0.1 + 1e-9


@settings(max_examples=30)
@given(rows=st.lists(st.text(min_size=1, max_size=5).map(lambda row: f"x{row}"), min_size=30, max_size=60))
def test_the_parts_of_a_table_are_its_rows_in_order(tmp_path_factory, rows):
    path = write_jsonl(tmp_path_factory.getbasetemp() / "rows.jsonl", [{"text": row} for row in rows])
    parts = [text.load_documents(path, split) for split in text.SPLITS]
    assert list(itertools.chain(*parts)) == rows
    assert all(parts)


def test_empty_rows_are_kept_wherever_they_stand(tmp_path):
    rows = ["", *["word"] * 20, "", ""]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    assert list(itertools.chain(*(text.load_documents(path, split) for split in text.SPLITS))) == rows


def test_jsonl_and_parquet_give_their_column_text(tmp_path):
    rows = ["one", "two\u2028with a line separator", "three\n"]
    jsonl, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    # Unescaped, as other writers do.
    jsonl.write_text("\n".join(json.dumps({"text": row, "n": 1}, ensure_ascii=False) for row in rows), encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": rows, "n": [1, 2, 3]}), table)
    for path in (jsonl, table):
        assert text.load_documents({"train": str(path)}, "train") == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, ["a.txt", "no such file", "pydoc, wikitext2, c4"]),
        ("a.txt", b"", ["a.txt", "train", "empty"]),
        ("a.txt", b" \n\n", ["a.txt", "train", "empty"]),
        ("a.txt", b"good \xff bad", ["a.txt", "not UTF-8 at byte 5"]),
        ("a.csv", b"text\n", [".csv", ".jsonl, .parquet, .txt, .tokens, .md"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"texts": "b"}\n', ["a.jsonl", "row 3", "'text' (keys: texts);"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": 7}\n', ["row 2"]),
        ("a.jsonl", b'{"text": "a"}\n["text"]\n', ["row 2"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["row 2", "not JSON"]),
        ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', ["a.jsonl", "empty"]),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, ["row 1", "not JSON"]),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["a.txt", "pointer of git-lfs"]),
        ("a.parquet", b"text", ["a.parquet", "not a readable Parquet file"]),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, name, content, said, whole):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        text.load_documents({"train": str(path)} if whole else str(path), "train")
    message = one_line(caught)
    assert all(part in message for part in said), message


def test_a_parquet_file_without_the_column_or_a_value_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    for names in (["content", "id"], ["text", "id", "text"]):
        parquet.write_table(pyarrow.table([["a"]] * len(names), names=names), path)
        with pytest.raises(UserError, match=f"no single column 'text', only {', '.join(names)}; rename"):
            text.load_documents(str(path), "train")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match="row 2"):
        text.load_documents(str(path), "train")


def test_a_file_too_short_to_split_asks_for_one_file_per_split(tmp_path):
    (tmp_path / "a.txt").write_text("one line and no other")
    assert text.load_documents(str(tmp_path / "a.txt"), "train") == ["one line and no other"]
    with pytest.raises(UserError, match=r'a.txt.*valid.*\{"train": path'):
        text.load_documents(str(tmp_path / "a.txt"), "valid")


@pytest.mark.parametrize(
    ("mapping", "said"), [({"train": "a.txt"}, "no test, only train"), ({"dev": "a.txt"}, "'dev'"), ({"test": 3}, "3")]
)
def test_a_mapping_must_hold_the_split_and_nothing_strange(mapping, said):
    with pytest.raises(UserError) as caught:
        text.load_documents(mapping, "test")
    assert said in one_line(caught)


# The command line and the protocol


@pytest.mark.parametrize("value", ["pydoc", "c4", "folder/corpus.txt", '{"train": "a.txt", "test": "b.txt"}'])
def test_a_command_line_gives_a_name_or_a_mapping(value):
    expected = json.loads(value) if value.startswith("{") else value
    assert text.parse_text(value) == expected


@pytest.mark.parametrize("value", ['{"train": "a.txt"', '{"train": 3}', '{"dev": "a.txt"}', "{'test': 'a'}"])
def test_a_broken_mapping_on_the_command_line_is_told(value):
    with pytest.raises(UserError) as caught:
        text.parse_text(value)
    assert '{"train": path' in one_line(caught)


def test_a_file_in_braces_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "{x}.txt").write_text("words")
    assert text.parse_text("{x}.txt") == "{x}.txt"


def test_a_name_that_is_no_text_is_told():
    with pytest.raises(UserError, match=r"found 'caf\\udce9.txt', which is not UTF-8"):
        text.parse_text("caf\udce9.txt")


def test_a_text_is_called_by_its_name_or_its_file():
    assert text.label("pydoc", "test") == "pydoc"
    assert text.label("some/where/a.txt", "test") == "a.txt"
    assert text.label({"train": "a.txt", "test": "some/where/b.txt"}, "test") == "b.txt"


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["pydoc", "some/a.txt"], ["pydoc", "a.txt"]),
        ([{"test": "wiki/test.txt"}, {"test": "stories/test.txt"}], ["wiki/test.txt", "stories/test.txt"]),
        (["one/x/a.txt", "b.txt", "two/x/a.txt", "/y/a.txt"], ["one/x/a.txt", "b.txt", "two/x/a.txt", "/y/a.txt"]),
        (["/a.txt", "/x/a.txt"], ["/a.txt", "x/a.txt"]),
    ],
)
def test_no_two_texts_are_called_the_same(texts, labels):
    assert text.labels(texts, "test") == labels


@pytest.mark.parametrize("texts", [["pydoc", "pydoc"], ["a.txt", "x/../a.txt"], ["a.txt", {"test": "a.txt"}]])
def test_a_text_named_twice_is_told(texts):
    with pytest.raises(UserError) as caught:
        text.labels(texts, "test")
    assert "named twice" in one_line(caught)


def test_lone_surrogates_are_replaced_and_counted(tmp_path, tokenizer, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a\ud83d b\udc00"}, {"text": "whole \U0001f600"}])
    documents = text.load_documents({"train": path}, "train")
    assert documents == ["a\ufffd b\ufffd", "whole \U0001f600"]
    assert "2 lone surrogates" in caplog.text
    assert len(text.token_stream(documents, tokenizer)) > 0


def test_a_token_without_a_row_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.embedding_rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<image>"})
    text.token_stream(["nothing odd"], tokenizer)
    with pytest.raises(UserError) as caught:
        text.token_stream(["an <image> here"], tokenizer)
    assert "'<image>'" in one_line(caught)


def test_the_protocol_names_what_was_read_and_no_folder():
    described = [
        text.describe(value, "test")
        for value in ("/some/where/a.jsonl", {"test": "/some/where/wiki.test.tokens"}, "pydoc", "wikitext2", "c4")
    ]
    for words, part in zip(described, ["a.jsonl", "wiki.test.tokens", "Python 3", "raw-v1", "1101"], strict=True):
        assert part in words
        assert "where" not in words
    assert "test part of 80/10/10" in described[0]
    assert "whole" in described[1]


# pydoc


def test_pydoc_is_two_megabytes_of_documentation_in_three_parts():
    documents = {split: text.load_documents("pydoc", split) for split in text.SPLITS}
    sizes = {split: sum(map(len, documents[split])) for split in documents}
    assert 1_500_000 < sum(sizes.values()) < 3_000_000
    assert sizes["train"] > 5 * max(sizes["valid"], sizes["test"])
    assert min(sizes["valid"], sizes["test"]) > 100_000
    everything = "".join(itertools.chain(*documents.values()))
    assert everything.count('The "for" statement is used to iterate') == 1
    assert everything.count("Serialize ``obj`` to a JSON formatted ``str``.") == 1


def test_pydoc_is_parsed_once_for_each_of_what_it_is_made_of(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        text, "_parse_pydoc", lambda: parsed.append(1) or {"train": ["caf\u00e9"], "valid": [], "test": []}
    )

    def read():
        return text._pydoc_splits.__wrapped__()["train"]

    assert read() == read() == ["caf\u00e9"] and len(parsed) == 1
    (kept,) = (tmp_path / "stepdown").iterdir()
    kept.write_text(kept.read_text()[:-5])
    assert read() == ["caf\u00e9"] and len(parsed) == 2
    monkeypatch.setattr(text, "_topics", lambda: [("topic for", "changed")])
    assert read() == ["caf\u00e9"] and len(parsed) == 3
    monkeypatch.setattr("stepdown.files.cache_folder", lambda: None)
    assert read() == ["caf\u00e9"] and len(parsed) == 4


def test_no_long_paragraph_of_pydoc_is_in_two_parts_or_twice_in_one():
    paragraphs = [
        " ".join(paragraph.split())
        for split in text.SPLITS
        for document in text.load_documents("pydoc", split)
        for paragraph in document.split("\n\n")
    ]
    long = [paragraph for paragraph in paragraphs if len(paragraph) > 60]
    assert len(long) == len(set(long)) > 5_000


def test_pydoc_reads_docstrings_in_order_and_imports_nothing(tmp_path, monkeypatch):
    source = '''
        """Module.

          Indented.
        """
        raise SystemExit("imported")
        if True:
            async def second():
                "Second, with an \\invalid escape."
                def third(): "Third."
        try: ...
        except ValueError:
            class Fourth: """Fourth."""
        not_one = "a string"
    '''.replace("\n        ", "\n")
    for name in (
        "json/__init__.py",
        "json/test/cases.py",
        "sitecustomize.py",
        "site-packages/json.py",
        "encodings/a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    expected = "Module.\n\nIndented.\n\nSecond, with an \\invalid escape.\n\nThird.\n\nFourth."
    assert text._docstrings() == [("module json.__init__", expected)]


@pytest.mark.parametrize(("name", "split"), [("topic for", "test"), ("topic yield", "valid"), ("topic while", "train")])
def test_a_document_of_pydoc_is_in_the_same_split_on_every_machine(name, split):
    assert text._pydoc_split(name) == split


# The hub


@pytest.fixture
def asked(monkeypatch):
    """What `load_dataset` is asked for; it answers with 30,000 numbered rows."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return ({"text": f"row {i}"} for i in range(30_000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(("split", "hub_split"), [("train", "train"), ("valid", "validation"), ("test", "test")])
def test_wikitext2_is_every_row_of_the_raw_split(asked, split, hub_split):
    assert len(text.load_documents("wikitext2", split)) == 30_000
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": hub_split})]


def test_c4_streams_the_published_files_and_test_is_disjoint_from_valid(asked):
    valid, test = text.load_documents("c4", "valid"), text.load_documents("c4", "test")
    train = text.load_documents("c4", "train")
    assert (len(train), len(valid), len(test)) == (20_000, 1_100, 1_100)
    assert not set(valid) & set(test)
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    held_out = (("allenai/c4",), {"data_files": files, "split": "validation", "streaming": True})
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked == [held_out, held_out, (("allenai/c4",), {"data_files": files, "split": "train", "streaming": True})]


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_hub_out_of_reach_is_told_in_one_line(monkeypatch, name):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        text.load_documents(name, "train")
    assert f"text {name}" in one_line(caught)
    assert "Couldn't reach the hub" in str(caught.value)


def test_a_connection_that_breaks_while_streaming_is_told_too(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise OSError("broken pipe")

    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: rows())
    with pytest.raises(UserError, match="broken pipe"):
        text.load_documents("c4", "train")


# Tokens


def test_documents_are_joined_by_blank_lines_and_tokenised_once():
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    stream = text.token_stream(["one", "", "two"], byte_tokenizer(post_processor=begin))
    assert stream.dtype == torch.int64
    assert stream[0] == 0
    assert (stream == 0).sum() == 1
    assert byte_tokenizer().decode(stream[1:]) == "one\n\n\n\ntwo"


def test_a_stream_in_pieces_is_the_stream(monkeypatch):
    monkeypatch.setattr(text, "PIECE", 10)
    documents = ["line\n" * 7 + "end", "", "no line end " * 5, "x"]
    tokenizer = byte_tokenizer()
    assert torch.equal(text.stream_in_pieces(documents, tokenizer), text.token_stream(documents, tokenizer))
    assert len(text.stream_in_pieces([""], tokenizer)) == 0


def test_a_text_longer_than_the_context_is_no_reason_to_warn(caplog):
    # Other tests silence the library.
    transformers.logging.set_verbosity_warning()
    short = byte_tokenizer(model_max_length=4)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        short("a text of more than four bytes")
        assert "longer than" in caplog.text
        caplog.clear()
        assert len(text.token_stream(["a text of more than four bytes"], byte_tokenizer(model_max_length=4))) == 30
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.text == ""


# Windows


@given(tokens=st.integers(0, 100), length=st.integers(1, 20), limit=st.none() | st.integers(1, 10))
def test_consecutive_windows_are_the_stream_without_its_remainder(tokens, length, limit):
    stream = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(UserError, match=f"has {tokens} tokens.*{length}"):
            text.consecutive_windows(stream, length, limit)
        return
    windows = text.consecutive_windows(stream, length, limit)
    count = tokens // length if limit is None else min(limit, tokens // length)
    assert windows.shape == (count, length)
    assert windows.flatten().tolist() == list(range(count * length))


def published_c4_sample(documents, tokenizer, count, length, seed):
    """As in the SparseGPT and Wanda repositories."""
    random.seed(seed)
    windows = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(documents) - 1)
            tokens = tokenizer(documents[i], return_tensors="pt").input_ids
            if tokens.shape[1] > length:
                break
        i = random.randint(0, tokens.shape[1] - length - 1)
        windows.append(tokens[0, i : i + length])
    return torch.stack(windows)


@given(
    documents=st.lists(st.text("abc ", min_size=1, max_size=3 * LENGTH), min_size=1, max_size=8),
    count=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_windows_within_documents_are_the_published_sample_and_never_hang(tokenizer, documents, count, seed):
    if max(map(len, documents)) <= LENGTH:
        with pytest.raises(UserError, match=f"none of {len(documents)} documents has more than {LENGTH} tokens"):
            text.random_windows(documents, tokenizer, count, LENGTH, seed, within_document=True)
        return
    windows = text.random_windows(documents, tokenizer, count, LENGTH, seed, within_document=True)
    assert torch.equal(windows, published_c4_sample(documents, tokenizer, count, LENGTH, seed))


@given(tokens=st.integers(1, 40), count=st.integers(1, 6), seed=st.integers(0, 1000))
def test_windows_of_the_stream_lie_in_it_and_follow_the_seed(tokenizer, tokens, count, seed):
    documents = ["".join(chr(ord("0") + i) for i in range(tokens))]
    if tokens <= LENGTH:
        with pytest.raises(UserError, match=f"has {tokens} tokens"):
            text.random_windows(documents, tokenizer, count, LENGTH, seed, within_document=False)
        return
    state = random.getstate()
    windows = text.random_windows(documents, tokenizer, count, LENGTH, seed, within_document=False)
    assert random.getstate() == state
    assert windows.shape == (count, LENGTH)
    assert all(tokenizer.decode(window) in documents[0] for window in windows)
    assert torch.equal(windows, text.random_windows(documents, tokenizer, count, LENGTH, seed, within_document=False))


def test_another_seed_is_another_sample(tokenizer):
    samples = [
        text.random_windows(["abcdefghij" * 50], tokenizer, 5, LENGTH, seed, within_document=False) for seed in (0, 1)
    ]
    assert not torch.equal(*samples)


def test_calibration_stays_within_documents_for_c4_only(tokenizer, monkeypatch):
    documents = ["a" * 20, "b" * 20, "c" * 20]
    splits = []
    monkeypatch.setattr(text, "load_documents", lambda name, split: splits.append(split) or documents)
    c4 = text.calibration_windows("c4", tokenizer, 40, 16, seed=0)
    other = text.calibration_windows("pydoc", tokenizer, 40, 16, seed=0)
    assert splits == ["train", "train"]
    assert all(len(set(window.tolist())) == 1 for window in c4)
    assert any(len(set(window.tolist())) > 1 for window in other)


def test_a_text_too_short_to_calibrate_or_train_on_is_named(tmp_path, tokenizer):
    path = str(tmp_path / "short.txt")
    Path(path).write_text("a\n" * 20)
    with pytest.raises(UserError, match=r"short\.txt, train split: has 32 tokens"):
        text.calibration_windows(path, tokenizer, 2, 100, seed=0)
    with pytest.raises(UserError, match=r"short\.txt, valid split: has 4 tokens"):
        text.training_windows(path, tokenizer, "valid", 100, None, seed=0)


def test_training_windows_are_all_or_a_seeded_choice_in_the_order_of_the_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"{i:07}\n" for i in range(100)))
    whole = {"train": str(tmp_path / "a.txt")}

    def numbers(count, seed=0):
        windows = text.training_windows(whole, tokenizer, "train", LENGTH, count, seed)
        return [int(tokenizer.decode(window)) for window in windows]

    assert numbers(None) == numbers(100) == numbers(1000) == list(range(100))
    assert numbers(10) == sorted(set(numbers(10)))
    assert len(numbers(10)) == 10
    assert numbers(10) == numbers(10) != numbers(10, seed=1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not on this machine")
def test_wikitext_as_published_is_cut_into_the_windows_it_is_measured_on():
    path = SHARED / "wikitext-2" / "wiki.valid.tokens"
    documents = text.load_documents({"valid": str(path)}, "valid")
    assert documents == [path.read_bytes().decode()]
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "wikillama-5m")
    windows = text.training_windows({"valid": str(path)}, tokenizer, "valid", 256, None, seed=0)
    assert documents[0].startswith(tokenizer.decode(windows[:20].flatten()))
