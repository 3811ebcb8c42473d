"""The files of a run: appended whole, mended after a kill, and read back line by line."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoa.errors import ConfigError
from dmoa.evaluation.pipeline import forget
from dmoa.evaluation.records import Answered, Scored, Task
from dmoa.evaluation.run_folder import RunFolder, append, mend, read_lines, write_lines, write_whole
from dmoa.flat import flat
from dmoa.types import TokenUsage


def row(number: int, text: str = "19") -> Answered:
    return Answered(row_id=f"arith/test/{number}", benchmark="arith", policy="dmoa", text=text, **flat(TokenUsage()))


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append(folder.answers("arith", "dmoa"), [row(1), row(2, "line one\nline two \u2028 three")])
    append(folder.answers("arith", "dmoa"), [row(3)])
    assert list(folder.read_answers("arith", "dmoa")) == [row(1), row(2, "line one\nline two \u2028 three"), row(3)]
    assert list(folder.read_answers("arith", "single")) == []


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    append(path, [row(1)])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a full disk does: the first part of the line is taken, the rest refused.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append(path, [row(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append(path, [row(3)])
    assert list(read_lines(path, Answered)) == [row(1), row(3)]


def test_labels_lie_in_a_folder_of_their_own() -> None:
    folder = RunFolder(Path("run"))
    apart = [folder.gold("mmlu"), folder.scores("mmlu", "dmoa")]
    open_ = [folder.tasks("mmlu"), folder.answers("mmlu", "dmoa"), folder.run]
    assert all("labels" in path.parts for path in apart)
    assert not any("labels" in path.parts for path in open_)


@given(cut=st.integers(min_value=0, max_value=10_000), texts=st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_a_file_cut_anywhere_loses_the_torn_line_alone(
    cut: int, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "answers.jsonl"
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    rows = [row(number, text) for number, text in enumerate(texts)]
    append(path, rows)
    data = path.read_bytes()
    cut = cut % (len(data) + 1)
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert list(read_lines(path, Answered)) == rows[:whole]
    mend(path)
    append(path, [row(99)])
    assert list(read_lines(path, Answered)) == [*rows[:whole], row(99)]


def test_a_torn_line_longer_than_a_page_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    append(path, [row(1)])
    with path.open("ab") as file:
        file.write(b'{"row_id": "' + b"x" * 10_000)
    mend(path)
    assert list(read_lines(path, Answered)) == [row(1)]
    mend(path)
    assert path.read_bytes().endswith(b"}\n")


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(row(1).model_dump_json() + "\n" + '{"row_id": 3}\n')
    with pytest.raises(ConfigError, match=r"answers.jsonl, line 2: not a Answered record .*remove the line"):
        list(read_lines(path, Answered))


def test_whole_files_replace_and_leave_nothing_beside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_whole(folder.run, "one")
    write_whole(folder.run, "two")
    tasks = [Task(row_id=f"a/test/{i}", benchmark="a", text="?") for i in range(3)]
    assert write_lines(folder.tasks("a"), tasks) == 3
    assert list(folder.read_tasks("a")) == tasks
    assert folder.run.read_text() == "two"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.jsonl", "run.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: cannot write .*name a folder"):
        write_whole(tmp_path / "file" / "run.json", "x")
    with pytest.raises(ConfigError, match=r"--out: cannot write .*run': .*name a folder"):
        RunFolder(tmp_path / "file" / "run").make()
    RunFolder(tmp_path / "new" / "run").make()
    assert (tmp_path / "new" / "run").is_dir()


def test_an_answer_whose_line_was_taken_out_is_judged_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lost = row(3).model_copy(update={"status": "failed", "error": "no agent"})
    append(folder.answers("arith", "dmoa"), [row(1), lost])
    scores = [Scored(row_id=f"arith/test/{n}", benchmark="arith", policy="dmoa", value=1.0) for n in (1, 2, 3)]
    append(folder.scores("arith", "dmoa"), scores)
    assert forget(folder, ["arith"], ["dmoa", "single"], failed=False) == 0
    assert list(folder.read_scores("arith", "dmoa")) == [scores[0], scores[2]]
    assert list(folder.read_answers("arith", "dmoa")) == [row(1), lost]
    assert forget(folder, ["arith"], ["dmoa", "single"], failed=True) == 1
    assert list(folder.read_scores("arith", "dmoa")) == [scores[0]]
    assert list(folder.read_answers("arith", "dmoa")) == [row(1)]


def test_a_policy_of_many_words_has_files_of_its_own(tmp_path: Path) -> None:
    folder, agents = RunFolder(tmp_path), "+".join(f"agent-of-skill-{number:02}" for number in range(15))
    for policy in (f"moa:layers=2:agents={agents}", f"moa:layers=2:agents={agents}+ä"):
        line = row(1).model_copy(update={"policy": policy})
        append(folder.answers("arith", policy), [line])
        write_lines(folder.answers("arith", policy), [line])  # by way of a draft, whose name is longer
        assert list(folder.read_answers("arith", policy)) == [line]
    assert len({path.name[:100] for path in (tmp_path / "answers").iterdir()}) == 1
    assert len(list((tmp_path / "answers").iterdir())) == 2
    assert folder.scores("arith", "moa:a/b").name == "arith.moa:a%2Fb.jsonl"
