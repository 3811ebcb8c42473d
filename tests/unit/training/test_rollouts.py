"""Reading rollouts: whole ones as they were written; nothing damaged, of another pool or another version."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dmoa.errors import ConfigError
from dmoa.training.rollouts import SCHEMA, check_rollout_pool, part_paths, read_manifest, read_part, read_table
from tests.unit.training.rollout_samples import AGENTS, POOL, manifest, replaced, rows, write_rollouts


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r", [rows(0), rows(1)], round=2)
    assert read_table(tmp_path / "r").equals(pa.concat_tables([rows(0), rows(1)]))
    assert read_manifest(str(tmp_path / "r")) == manifest(round=2)
    one = read_part(part_paths(tmp_path / "r")[1], columns=("query_id", "step"))
    assert one.equals(rows(1).select(["query_id", "step"]))


def test_a_folder_without_parts_is_empty(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "r", [])
    assert read_table(tmp_path / "r").equals(SCHEMA.empty_table())


def test_columns_that_a_later_version_adds_are_passed_over(tmp_path: Path) -> None:
    later = rows().append_column("mood", pa.array(["fine"] * len(rows())))
    write_rollouts(tmp_path / "r", [later])
    assert read_table(tmp_path / "r").equals(rows())


@pytest.mark.parametrize("size", [0, 3, 1000, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, size: int) -> None:
    folder = write_rollouts(tmp_path / "r", [rows(0), rows(1)])
    path = folder.parts / "part-000001.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"part-000001\.parquet: not a whole Parquet file: .+; remove the file"):
        read_table(tmp_path / "r")


def test_every_flipped_byte_of_the_data_is_noticed(tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "r", [rows(0)])
    (path,) = part_paths(folder.root)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    places = range(16, len(whole) - footer, 101)
    unnoticed = 0
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(ConfigError):
            unnoticed += not read_part(path).equals(rows(0))
    assert len(places) > 20
    assert unnoticed == 0, "a changed value never passes for a value"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pool_fingerprint", "e" * 64, f"pool_fingerprint is '{'e' * 64}'; expected '{POOL}'"),
        ("schema_version", 2, "schema_version is 2; this dmoa reads 1; use the dmoa that wrote it"),
    ],
)
def test_rows_of_another_pool_or_version_are_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    write_rollouts(tmp_path / "r", [rows(0), replaced(rows(1), name, value)])
    with pytest.raises(ConfigError, match=rf"part-000001\.parquet: {re.escape(message)}"):
        read_table(tmp_path / "r")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (rows().drop_columns(["propensity"]), "column propensity is None; expected double"),
        (
            rows().set_column(3, "step", pa.array(["0"] * len(rows()))),
            "column step is string; expected int64",
        ),
        (
            rows().set_column(5, "context", pa.array([[1.0]] * len(rows()), pa.list_(pa.float64()))),
            "column context is list<element: double>; expected list<item: float>",
        ),
    ],
)
def test_other_columns_are_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    write_rollouts(tmp_path / "r", [table])
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_table(tmp_path / "r")


@pytest.mark.parametrize("name", SCHEMA.names)
def test_a_null_is_named_by_row_and_column(tmp_path: Path, name: str) -> None:
    values = rows()[name].to_pylist()
    place, column = SCHEMA.names.index(name), pa.array([*values[:5], None, *values[6:]], SCHEMA.field(name).type)
    write_rollouts(tmp_path / "r", [rows().set_column(place, pa.field(name, column.type), column)])
    with pytest.raises(ConfigError, match=rf"part-000000\.parquet, row 5: {name} is null; expected .+; remove the file"):
        read_table(tmp_path / "r")


def test_a_null_within_a_list_is_named(tmp_path: Path) -> None:
    values = rows()["context"].to_pylist()
    column = pa.array([*values[:3], [*values[3][:-1], None], *values[4:]], SCHEMA.field("context").type)
    write_rollouts(tmp_path / "r", [rows().set_column(SCHEMA.names.index("context"), pa.field("context", column.type), column)])
    with pytest.raises(ConfigError, match="row 3: context is null"):
        read_table(tmp_path / "r")


@pytest.mark.parametrize("name", ["entropy_kind", "finish_reason", "status"])
def test_a_word_that_a_column_does_not_know_is_refused(tmp_path: Path, name: str) -> None:
    values = rows()[name].to_pylist()
    column = pa.array([*values[:-1], "splendid"])
    write_rollouts(tmp_path / "r", [rows().set_column(SCHEMA.names.index(name), SCHEMA.field(name), column)])
    with pytest.raises(ConfigError, match=rf"row {len(values) - 1}: {name} is 'splendid'; expected one of \w+, "):
        read_table(tmp_path / "r")


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "r", [rows(0), rows(1)])
    path = folder.parts / "part-000001.parquet"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"part-000001\.parquet: not a whole Parquet file: .* is no regular file"):
        read_table(tmp_path / "r")


def test_a_manifest_without_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "rollouts.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"rollouts\.json.*no regular file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "invalid JSON"),
        (manifest().model_dump_json().replace('"schema_version":1', '"schema_version":7'), "schema_version is 7"),
        (json.dumps(json.loads(manifest().model_dump_json()) | {"mood": 1}), "mood: unknown key (value 1)"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "rollouts.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_manifest(tmp_path)
    assert "rollouts.json" in str(caught.value)


def test_another_pool_is_refused_with_the_agents_that_differ() -> None:
    check_rollout_pool(manifest(), fingerprint=POOL, agents=AGENTS)
    with pytest.raises(
        ConfigError, match=r"pool_fingerprint is ffffffffffff \(pool tiny\), .*only in the rollouts: dead; only in the pool: new"
    ):
        check_rollout_pool(manifest(), fingerprint="0" * 64, agents=("adder", "guesser", "echo", "new"))
    with pytest.raises(ConfigError, match="or the order of the agents differs"):
        check_rollout_pool(manifest(), fingerprint="0" * 64, agents=AGENTS[::-1])
