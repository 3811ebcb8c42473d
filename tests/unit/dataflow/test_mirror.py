"""Folders at a URI, by way of `file://`: what is fetched, written back, left alone, and kept where writing fails."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from dmoa.errors import ConfigError, DmoaError
from dmoa.storage import Mirror, display_path, local_copy, localized, only_one, place_of, under, uri_of


class Options(BaseModel):
    model_config = ConfigDict(frozen=True)

    out: Path
    rollouts: tuple[Path, ...] = ()


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    here = tmp_path / "out"
    second = only_one(here, "training", "train")
    with only_one(here, "training", "train"):
        with pytest.raises(ConfigError, match=r"--out: another training is writing to '.*out'; wait for it"), second:
            pytest.fail("two write at once")
        with only_one(here, "evaluation"):  # of another kind
            assert here.is_dir()
    with only_one(here, "training", "train"):
        assert here.is_dir()
    (tmp_path / "file").write_text("")
    impossible = only_one(tmp_path / "file" / "out", "training")
    with pytest.raises(ConfigError, match=r"--out: cannot write '.*file/out': .*; name a folder that can be"), impossible:
        pytest.fail("there is no folder")


def stopped_run(there: Path, said: list[str]) -> None:
    with localized(Options(out=Path(there.as_uri())), said.append, writes=("out",)) as options:
        assert files(options.out) == {"first": "1"}, "it goes on with what lies there"
        (options.out / "second").write_text("2")
        raise DmoaError("stopped")


@pytest.fixture
def said() -> list[str]:
    return []


@given(
    st.sampled_from(["s3", "gs", "gcs", "abfs", "hdfs"]),
    st.from_regex(r"[a-z][a-z0-9.]{0,7}(/[a-z0-9]{1,8}){0,3}", fullmatch=True),
)
def test_a_uri_is_known_also_after_it_became_a_path(scheme: str, rest: str) -> None:
    assert uri_of(f"{scheme}://{rest}") == uri_of(Path(f"{scheme}://{rest}")) == f"{scheme}://{rest}"


@pytest.mark.parametrize("place", ["out/run", "/tmp/run", "s3", "runs3:/x", "out/s3:/x", "C:/x"])
def test_a_folder_is_no_uri(place: str) -> None:
    assert uri_of(Path(place)) is None
    assert display_path(Path(place)) == str(Path(place))


@pytest.mark.parametrize("options", ["scheme=http&endpoint_override=minio:9000", "endpoint_override=http://minio:9000"])
def test_the_options_of_a_uri_stay_at_its_end(options: str) -> None:
    uri = f"s3://bucket/gate?{options}"
    assert uri_of(Path(uri)) == uri_of(uri) == uri
    assert under(uri, "state") == f"s3://bucket/gate/state?{options}"
    assert under("s3://bucket/gate/", "state") == "s3://bucket/gate/state"


def test_what_lies_in_a_copy_is_known_by_its_uri_with_options(tmp_path: Path) -> None:
    uri = f"{tmp_path.as_uri()}/run?use_mmap"
    with localized(Options(out=Path(uri)), lambda text: None, writes=("out",)) as options:
        (options.out / "made").write_text("1")
        assert options.out.name == "run"
        assert display_path(options.out) == uri
        assert display_path(options.out / "deep" / "made") == f"{tmp_path.as_uri()}/run/deep/made?use_mmap"
    assert files(tmp_path / "run") == {"made": "1"}


def test_a_place_that_no_file_system_serves_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"router\.state_uri is 'nowhere://\[redacted\]@host/x'; expected") as raised:
        place_of("nowhere://me:hunter2pass@host/x", "router.state_uri")
    assert "hunter2" not in str(raised.value)


def test_what_changed_goes_there_and_what_went_goes_there_too(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    (there / "deep").mkdir(parents=True)
    (there / "deep" / "kept").write_text("kept")
    (there / "old").write_text("old")
    (there / "state").mkdir()
    (there / "state" / "weights").write_text("the workers'")
    found = Mirror(there.as_uri(), here, apart=("state",))
    assert found.fetch() == 2
    assert files(here) == {"deep/kept": "kept", "old": "old"}
    assert found.push() == 0, "nothing has changed"
    (here / "new").write_text("new")
    (here / "deep" / ".draft").write_text("not whole yet")
    (here / ".gate.1a2b3c4d").mkdir()
    (here / ".gate.1a2b3c4d" / "gate.json").write_text("nor is this folder")
    (here / "old").unlink()
    with (here / "deep" / "kept").open("a") as file:
        file.write(" and more")
    assert found.push() == 2
    assert files(there) == {"deep/kept": "kept and more", "new": "new", "state/weights": "the workers'"}


def test_a_run_is_written_back_while_it_goes_on_and_at_its_end(tmp_path: Path, said: list[str]) -> None:
    there = tmp_path / "there" / "run"
    with localized(Options(out=Path(there.as_uri())), said.append, writes=("out",), period_s=0.01) as options:
        assert options.out.name == "run"
        assert options.out.is_dir()
        (options.out / "first").write_text("1")
        deadline = time.monotonic() + 30
        while not (there / "first").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert display_path(options.out / "first") == (there / "first").as_uri()
        local = options.out
    assert not local.exists()
    with pytest.raises(DmoaError, match="stopped"):
        stopped_run(there, said)
    assert files(there) == {"first": "1", "second": "2"}, "what was made before the error is kept"
    assert "holds 1 files" in said[1]


def test_folders_to_read_are_fetched_and_never_written(tmp_path: Path, said: list[str]) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "part").write_text("rows")
    given_ = Options(out=tmp_path / "out", rollouts=(Path(there.as_uri()), tmp_path / "own"))
    with localized(given_, said.append, reads=("rollouts",), writes=("out",)) as options:
        assert (options.out, options.rollouts[1]) == (given_.out, given_.rollouts[1])
        (options.rollouts[0] / "part").write_text("other rows")
        local = options.rollouts[0]
    assert files(there) == {"part": "rows"}
    assert not local.parent.exists()
    with local_copy(there, "DIR") as same:
        assert same == there


def test_nothing_to_read_and_no_file_system_are_one_message(tmp_path: Path, said: list[str]) -> None:
    nowhere = Path((tmp_path / "nowhere").as_uri())
    with (
        pytest.raises(ConfigError, match=r"rollouts is 'file:///.*nowhere'; nothing lies there"),
        localized(Options(out=tmp_path, rollouts=(nowhere,)), said.append, reads=("rollouts",)),
    ):
        pass
    with pytest.raises(ConfigError, match="DIR: cannot read 'abfss://x/y'"), local_copy(Path("abfss://x/y"), "DIR"):
        pass


def test_a_place_that_cannot_be_written_leaves_the_local_copy(tmp_path: Path, said: list[str]) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder would be")
    with (
        pytest.raises(DmoaError, match="what was made lies in") as raised,
        localized(Options(out=Path(blocked.as_uri()) / "run"), said.append, writes=("out",)) as options,
    ):
        (options.out / "made").write_text("hours of work")
    assert files(options.out) == {"made": "hours of work"}
    assert str(options.out) in str(raised.value)
    shutil.rmtree(options.out.parent)


def test_a_place_that_is_gone_is_no_file_that_is_gone(said: list[str]) -> None:
    nowhere = Path("file:///proc/none/run")  # Linux says "no such file" to whoever makes a folder there
    with pytest.raises(FileNotFoundError):
        Path("/proc/none").mkdir()
    with (
        pytest.raises(DmoaError, match="what was made lies in") as raised,
        localized(Options(out=nowhere), said.append, writes=("out",)) as options,
    ):
        (options.out / "made").write_text("hours of work")
    assert files(options.out) == {"made": "hours of work"}, raised.value
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    shutil.rmtree(options.out.parent)
