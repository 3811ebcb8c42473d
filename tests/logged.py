"""What a test logs. Pytest's own plug-in for it would look at each of a thousand loggers six times a test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord


class Logged(logging.Handler):
    """Keeps the records of a test; one whose arguments do not fit its format fails it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)-8s %(name)s:%(filename)s:%(lineno)d %(message)s"))
        self.records: list[LogRecord] = []
        self._lines: list[str] = []

    def emit(self, record: LogRecord) -> None:
        self.records.append(record)
        self._lines.append(self.format(record))

    @property
    def messages(self) -> list[str]:
        """What was said, without when and where."""
        return [record.getMessage() for record in self.records]

    @property
    def text(self) -> str:
        """What a log file would hold, errors' tracebacks too."""
        return "".join(f"{line}\n" for line in self._lines)

    def clear(self) -> None:
        """Forget all of it."""
        self.records, self._lines = [], []

    @contextmanager
    def at_level(self, level: int, logger: str | None = None) -> Iterator[None]:
        """Set the level of a logger, of the root without a name, for a while."""
        target = logging.getLogger(logger)
        before = target.level
        target.setLevel(level)
        try:
            yield
        finally:
            target.setLevel(before)


LOGGED = Logged()
"""On the root logger of every process that runs tests."""
