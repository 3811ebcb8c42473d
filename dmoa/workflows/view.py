"""`dmoa view`: the page over what lies on disk, without a server: traces, trainings, evaluations of a folder."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmoa.errors import ConfigError, DmoaError
from dmoa.evaluation.figures import curves
from dmoa.evaluation.results import Evaluation, read_evaluation
from dmoa.reading import MAX_OWN_BYTES, lines_of, offsets, read_json, regular
from dmoa.serving.http.page import create_view
from dmoa.serving.trace_list import TraceCalls, TraceFilter, TracePage, TraceSummary, page_of, statistics_of, summarise
from dmoa.trace import Trace, answer_of_reply
from dmoa.validation import is_finite

_LOG = logging.getLogger("dmoa.view")
_MAX_POINTS = 2000
"""Points of one curve; of a longer one every so many."""
_MAX_TRACE_FILES = 20_000
_SPLIT = re.compile(r"^(train|held)_")
"""What names the rows of a curve: `train_loss` and `held_loss` are drawn together."""


class Folder:
    """Reads a folder; implements `http.page.PageFiles`. Trace files are read once, runs whenever they are looked at."""

    def __init__(self, root: Path) -> None:
        """Read the traces in the folder. Raises ConfigError where it is none."""
        if not root.is_dir():
            raise ConfigError(f"DIR is {str(root)!r}, which is no folder; give one that dmoa wrote")
        self.root = root
        self._places: dict[str, tuple[Path, int]] = {}
        self._summaries: list[TraceSummary] = []
        self._calls: list[TraceCalls] = []
        for path in sorted(root.rglob("*.jsonl"))[:_MAX_TRACE_FILES]:
            self._read(path)

    def _read(self, path: Path) -> None:
        """Take the traces of a file; one that holds none is passed over after its first line."""
        with suppress(OSError, ConfigError), open(path, "rb", opener=regular) as file:
            offset = 0
            for line in lines_of(file, path, MAX_OWN_BYTES):
                try:
                    trace = Trace.model_validate_json(line)
                    answer = answer_of_reply(trace.dmoa, text="", finish_reason="stop", wall_ms=trace.wall_ms)
                    question = str(trace.query.get("text", ""))
                    summary, calls = summarise(answer, question=question, created_unix_s=trace.created_unix_s)
                except (ValueError, ArithmeticError):  # also for numbers that nobody counted
                    if not offset:
                        return
                else:
                    if trace.trace_id not in self._places:
                        self._summaries.append(summary)
                        self._calls += calls
                    self._places[trace.trace_id] = (path, offset)
                offset += len(line)

    def status(self) -> dict[str, Any]:
        """Return what the page shows of the folder in place of a pool."""
        return {
            "pool": str(self.root),
            "agents": {},
            "policies": sorted({one.policy for one in self._summaries}),
            "is_admin": False,
            "can_ask": False,
            "router": None,
            "statistics": [one.model_dump() for one in statistics_of(self._calls)],
        }

    def traces(self, wanted: TraceFilter) -> TracePage:
        """Return a page of the traces, newest first."""
        return page_of(self._summaries, wanted)

    def trace(self, trace_id: str) -> dict[str, Any] | None:
        """Return a trace, None where there is none of that id."""
        if trace_id not in self._places:
            return None
        path, offset = self._places[trace_id]
        with suppress(OSError, ValueError), path.open("rb") as file:  # it may be gone by now, or another one
            file.seek(offset)
            found: dict[str, Any] = read_json(file.readline(), nan_is_null=True)
            return found
        return None

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs of the folder: evaluations by their run.json, trainings and others by their metrics.jsonl."""
        return [
            {"id": run_id, "name": run_id, "kind": kind, "unix_s": path.stat().st_mtime}
            for run_id, (kind, path) in sorted(self._runs().items())
        ]

    def run(self, run_id: str) -> dict[str, Any] | None:
        """Return what is shown of a run, None where there is none of that id."""
        kind, path = self._runs().get(run_id, ("", Path()))
        named = {"id": run_id, "name": run_id, "kind": kind}
        try:
            if kind == "evaluation":
                found = of_evaluation(read_evaluation(path.parent))
                return {**named, **read_json(json.dumps(found), nan_is_null=True)}
            return None if not kind else named | of_training(path)
        except (DmoaError, ArithmeticError) as error:
            return named | {"kind": "training", "facts": {"unreadable": str(error)}, "curves": []}

    def _runs(self) -> dict[str, tuple[str, Path]]:
        found: dict[str, tuple[str, Path]] = {}
        for name, kind in (("metrics.jsonl", "training"), ("run.json", "evaluation")):
            for path in self.root.rglob(name):
                place = path.parent.relative_to(self.root)
                if "curve" not in place.parts:
                    # A browser takes a last "." for the list itself.
                    found[str(place) if place.parts else f"{self.root.resolve().name} (DIR)"] = (kind, path)
        return found


def of_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures of an evaluation that the page draws, the same that its report has."""
    run = evaluation.config
    rows = [
        {
            "benchmark": row.benchmark,
            "policy": row.policy,
            "n": row.n,
            "accuracy": row.accuracy,
            "low": row.low,
            "high": row.high,
            "tokens": row.per_query(row.usage.total),
            "steps_mean": row.steps_mean,
            "active_mean": row.active_mean,
        }
        for row in evaluation.rows
    ]
    lines = defaultdict(list)
    for line in curves(evaluation):
        points = [[count, row.accuracy] for count, row in sorted(line.rows.items())]
        lines[line.benchmark].append({"name": f"{line.policy}, defence {line.defence}", "points": points})
    facts = {"pool": run.pool.name, "gate": run.gate_version or "", "seed": str(run.seed), "dmoa": run.dmoa_version}
    robustness = [{"title": name, "x": "agents that work against the swarm", "series": series} for name, series in lines.items()]
    return {"facts": facts, "rows": rows, "robustness": robustness}


def of_training(path: Path) -> dict[str, Any]:
    """Return the curves that a run logged, those of one kind (`train/loss`, `held_loss`) together."""
    settings: dict[str, Any] = {}
    series: dict[str, list[list[float]]] = defaultdict(list)
    for number, message in enumerate(_messages(path)):
        op, step = message.get("op"), message.get("step")
        place: float = step if is_finite(step) else number  # type: ignore[assignment]  # `is_finite` looked
        values = message.get("values" if op == "config" else "metrics")
        if op == "config" and isinstance(values, dict):
            settings |= values
        if op == "log" and isinstance(values, dict):
            for name, value in values.items():
                if is_finite(value):
                    series[name].append([place, value])
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, points in series.items():
        thinned = points[:: math.ceil(len(points) / _MAX_POINTS)]
        groups[_SPLIT.sub("", name.rpartition("/")[2])].append({"name": name, "points": thinned})
    facts = {name: str(settings[name]) for name in ("command", "dmoa_version", "code_revision") if settings.get(name)}
    drawn = [{"title": title, "series": lines} for title, lines in groups.items()]
    return {"facts": facts, "curves": drawn, "settings": settings}


def _messages(path: Path) -> Iterator[dict[str, Any]]:
    for _, line in offsets(path):
        with suppress(ValueError):  # what a killed run left of a line
            message = read_json(line, nan_is_null=True)  # no page can show NaN
            if isinstance(message, dict):
                yield message


def serve_folder(folder: Folder, listener: socket.socket) -> None:
    """Serve the page of a folder on a loopback socket until the process is interrupted."""
    import uvicorn

    settings = uvicorn.Config(create_view(folder), log_level="warning", lifespan="off")
    uvicorn.Server(settings).run(sockets=[listener])
