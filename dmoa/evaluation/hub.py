"""Rows from the Hugging Face hub: one table of data sets at fixed revisions, read through the `datasets` library.

Used where no `--data-dir` is given. The table's revisions are commits of the data set repositories: the rows of a result
are the same rows tomorrow. Both libraries are imported when they are first needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks.upstream import Slice
from dmoa.evaluation.records import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """Where the hub keeps a benchmark."""

    dataset: str
    """Repository of the data set."""
    revision: str
    """Commit of that repository."""
    config: str | None = None
    """Configuration of the data set; None: its only one."""
    slices: Mapping[Split, Slice] | None = None
    """Which hub split each split comes from; None: the hub's splits are named as the benchmark's files are."""
    max_rows: int | None = None
    """At most this many rows of a hub split, evenly spaced; None: all. For data sets that would not fit into memory."""


# Upstream has one split, `test`: a fifth of the families is set apart for training and adaptation.
_FROM_TEST: dict[Split, Slice] = {
    "train": Slice(file="test", high=0.12),
    "adaptation": Slice(file="test", low=0.12, high=0.2),
    "test": Slice(file="test", low=0.2),
}
_DDXPLUS: dict[Split, Slice] = {
    "train": Slice(file="train", high=0.6),
    "adaptation": Slice(file="train", low=0.6),
    "test": Slice(file="validate"),
}

HUB: dict[str, HubSource] = {
    "mmlu": HubSource(dataset="cais/mmlu", config="all", revision="c30699e8356da336a370243923dbaf21066bb9fe"),
    "gsm8k": HubSource(dataset="openai/gsm8k", config="main", revision="740312add88f781978c0658806c59bc2815b9866"),
    "multiarith": HubSource(dataset="ChilleD/MultiArith", revision="144d44c3fb87c0b9097ac9593c789e716a282e3e"),
    "svamp": HubSource(dataset="ChilleD/SVAMP", revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef"),
    "aqua_rat": HubSource(dataset="deepmind/aqua_rat", config="raw", revision="33301c6a050c96af81f63cad5562cb5363e88971"),
    "humaneval": HubSource(
        dataset="openai/openai_humaneval", revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", slices=_FROM_TEST
    ),
    "ds1000": HubSource(dataset="xlangai/DS-1000", revision="4416080ac5cb80bdf7576aefb8f9a0b4d5426a44", slices=_FROM_TEST),
    "hotpotqa": HubSource(
        dataset="hotpotqa/hotpot_qa", config="distractor", revision="1908d6afbbead072334abe2965f91bd2709910ab", max_rows=20_000
    ),
    "ddxplus": HubSource(
        dataset="aai530-group6/ddxplus", revision="2ad986acc1ec62fb4a94171acc43f4fdd5bfde53", slices=_DDXPLUS, max_rows=20_000
    ),
}


def read_split(source: HubSource, split: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """The name under which the split is recorded, and its rows with upstream's field names.

    Raises:
        ConfigError: the data set cannot be had: no network, offline mode, no such revision, configuration or split.
    """
    import datasets
    import httpx

    name = f"{source.dataset}{f'[{source.config}]' if source.config else ''}:{split}"
    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, httpx.HTTPError) as error:
        raise unavailable(name, source, error) from error
    stride = -(-len(rows) // source.max_rows) if source.max_rows else 1
    if stride > 1:
        name, rows = f"{name}[::{stride}]", rows.select(range(0, len(rows), stride))
    return name, iter(rows)


def fetch_file(source: HubSource, file: str) -> Path:
    """A file of the data set's repository, in the hub's cache.

    Raises:
        ConfigError: it cannot be had.
    """
    import httpx
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(source.dataset, file, repo_type="dataset", revision=source.revision))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise unavailable(f"{source.dataset}/{file}", source, error) from error


def unavailable(name: str, source: HubSource, error: Exception) -> ConfigError:
    """What to tell who asked for rows that the hub does not give."""
    return ConfigError(
        f"{name} at revision {source.revision} cannot be had from the Hugging Face hub: {type(error).__name__}: {error}. "
        "Give the folder of the rows with --data-dir, or run where the hub or its cache can be reached."
    )
