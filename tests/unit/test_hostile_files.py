"""Files that are none, in place of those that commands and servers read: a pipe is refused at once, wherever it lies."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmoa.agents.pool import check_corpus
from dmoa.agents.tools import Bm25Corpus
from dmoa.config import Config
from dmoa.engines.models import fault_of_folder
from dmoa.engines.recorded import ReplyIndex
from dmoa.errors import ConfigError, DmoaError
from dmoa.evaluation.records import Answered, RunInfo
from dmoa.evaluation.run_folder import read_lines, read_record
from dmoa.policies.routers import judged_of
from dmoa.reading import MAX_PARTS, hash_file, num_parts, offsets, read_bounded, read_json, regular
from dmoa.serving.router.probes import read_probes
from dmoa.serving.trace_archive import TraceArchive
from dmoa.testing import scripted_pool
from dmoa.trace import read_traces
from dmoa.training.outcomes import read_outcomes
from dmoa.training.queries import read_queries
from dmoa.workflows.collect import LABELS, read_labels
from dmoa.workflows.view import Folder
from dmoa.yaml_tree import read


@contextmanager
def pipe(path: Path) -> Iterator[Path]:
    """Yield a pipe with a name. Who opens it and waits finds it empty, so that a reader that falls for it fails, not hangs."""
    os.mkfifo(path)
    is_over = threading.Event()

    def write_nothing() -> None:
        while not is_over.wait(0.01):
            with suppress(OSError):  # nobody reads it
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    writer = threading.Thread(target=write_nothing)
    writer.start()
    try:
        yield path
    finally:
        is_over.set()
        writer.join()


def with_corpus(path: Path) -> Config:
    config = scripted_pool()
    return config.model_copy(update={"tools": config.tools.model_copy(update={"search_corpus": str(path)})})


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "pool": ("pool.yaml", read),
    "gate": ("gate.json", read_bounded),
    "queries": ("queries.txt", read_queries),
    "queries in a table": ("queries.csv", read_queries),
    "outcomes": ("outcomes.jsonl", read_outcomes),
    "outcomes, packed": ("outcomes.jsonl.gz", read_outcomes),
    "traces": ("traces.jsonl", read_traces),
    "corpus": ("corpus.jsonl", Bm25Corpus.load),
    "corpus of a pool": ("corpus.jsonl", lambda path: check_corpus(with_corpus(path))),
    "replies": ("replies.jsonl", lambda path: ReplyIndex(path.parent)),
    "replies in a table": ("replies.parquet", lambda path: ReplyIndex(path.parent)),
    "answers": ("answers.jsonl", lambda path: list(read_lines(path, Answered))),
    "run": ("run.json", lambda path: read_record(path, RunInfo)),
    "rows": ("rows.jsonl", hash_file),
    "curves": ("metrics.jsonl", lambda path: list(offsets(path))),
    "judged replies": ("judged.jsonl", lambda path: judged_of(str(path), ("a",))),
    "known answers": ("known.jsonl", lambda path: read_probes(str(path))),
    "labels": (LABELS, lambda path: list(read_labels(path.parent))),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    file, reader = READERS[name]
    with pipe(tmp_path / file), pytest.raises((OSError, DmoaError), match="is no regular file") as caught:
        reader(tmp_path / file)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_among_the_files_of_a_folder_is_passed_over_or_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pipe(tmp_path / "model.safetensors"):
        assert "model.safetensors cannot be read" in str(fault_of_folder(tmp_path))
    with pipe(tmp_path / "traces.jsonl"), pipe(tmp_path / "metrics.jsonl"):
        found = Folder(tmp_path)
        assert found.status()["policies"] == []
        (run,) = found.runs()
        assert "is no regular file" in (found.run(run["id"]) or {})["facts"]["unreadable"]
    with pipe(tmp_path / "1-a.index.jsonl"):
        assert list(TraceArchive(tmp_path.as_uri()).load()) == []


def test_a_device_is_no_file_and_what_a_shell_hands_over_is_one() -> None:
    with pytest.raises(OSError, match="'/dev/zero' is no regular file"):
        regular("/dev/zero", os.O_RDONLY)
    reader, writer = os.pipe()
    os.write(writer, b'{"query": "What is 2 + 2?"}\n')
    os.close(writer)
    try:
        assert [one.text for one in read_queries(Path(f"/dev/fd/{reader}")).queries] == ["What is 2 + 2?"]
    finally:
        os.close(reader)


@pytest.mark.parametrize("name", ["queries", "queries in a table", "outcomes", "corpus", "replies"])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path, name: str) -> None:
    file, reader = READERS[name]
    (tmp_path / file).touch()
    os.truncate(tmp_path / file, 8 << 30)  # of zeros, which take no room on the disk
    with pytest.raises(ConfigError, match="line 1: longer than 64 MiB"):
        reader(tmp_path / file)


@pytest.mark.parametrize("name", ["corpus", "labels", "known answers", "outcomes", "traces"])
def test_json_that_is_nested_without_end_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, reader = READERS[name]
    (tmp_path / file).write_text("[" * 100_000 + "\n")
    with pytest.raises(DmoaError) as caught:
        reader(tmp_path / file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_model_whose_settings_are_nested_without_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json" in str(fault_of_folder(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    header = b"[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors cannot be read" in str(fault_of_folder(tmp_path))


def test_a_small_table_of_endless_rows_is_refused(tmp_path: Path) -> None:
    rows = pa.table({"agent": pa.array(["a" * 1000]).dictionary_encode().take(pa.array([0] * 200_000))})
    pq.write_table(rows, tmp_path / "replies.parquet")
    assert (tmp_path / "replies.parquet").stat().st_size < 50_000
    with pytest.raises(ConfigError, match="claim to hold 200000 rows"):
        ReplyIndex(tmp_path)


def test_an_index_of_traces_without_end_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "1-a.index.jsonl").touch()
    os.truncate(tmp_path / "1-a.index.jsonl", 8 << 30)
    assert list(TraceArchive(tmp_path.as_uri()).load()) == []


@pytest.mark.parametrize(
    ("text", "objects", "lists"),
    [
        ('{"a": [{}, {"b": "{[["}], "[": 1}', 3, 1),
        (r'{"a\"{": "[\\", "b": [[]]}', 1, 2),
        ('[{"a": "no end {{[[ \\', 1, 1),
        ('["', 0, 1),
        ("\ud800[[", 0, 2),
    ],
)
def test_the_parts_of_a_text_are_counted_as_they_are_read(text: str, objects: int, lists: int) -> None:
    for data in (text, text.encode("utf-8", "surrogatepass")):
        assert num_parts(data, "{", objects - 1 if objects else 0) == objects
        assert num_parts(data, "[", lists - 1) == lists
        assert num_parts(data, "{[", 100) <= 100


@pytest.mark.parametrize("part", ["{}", "[]"])
def test_a_small_file_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path: Path, part: str) -> None:
    text = "[" + f"{part}," * MAX_PARTS + "0]"
    with pytest.raises(ValueError, match=f"{MAX_PARTS + 1} JSON lists and objects; expected at most {MAX_PARTS}"):
        read_json(text)
    (tmp_path / "rows.jsonl").write_text(f"{text}\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 1: .* JSON lists and objects; expected"):
        list(offsets(tmp_path / "rows.jsonl"))
    with pytest.raises(OSError, match=r"it holds .* JSON lists and objects; expected"):
        read_bounded(tmp_path / "rows.jsonl", most=1 << 26)
    assert read_json(f'["{text}"]'.replace('""', "")) is not None, "brackets of a text within it are none"
