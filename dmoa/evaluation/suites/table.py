"""The built-in suites by name: what `dmoa evaluate` and the jobs look up."""

from __future__ import annotations

from dmoa.evaluation.suites.arith import ARITH
from dmoa.evaluation.suites.calendar import CALENDAR
from dmoa.evaluation.suites.chain import CHAIN
from dmoa.evaluation.suites.relay import RELAY
from dmoa.evaluation.suites.shared import SHARED
from dmoa.evaluation.suites.suite import Suite
from dmoa.evaluation.suites.words import WORDS

SUITES: dict[str, Suite] = {suite.name: suite for suite in (ARITH, WORDS, CALENDAR, SHARED, CHAIN, RELAY)}
"""In the order of tables."""
