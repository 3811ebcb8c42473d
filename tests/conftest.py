"""Settings that must be made before torch is loaded, what a unit test may not do, and how tests are dealt to processes."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import platform
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from xdist.remote import Producer
from xdist.scheduler import EachScheduling, LoadFileScheduling
from xdist.workermanage import WorkerController

from dmoa import sandbox
from tests.examples import is_all
from tests.logged import LOGGED, Logged

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow everything some thirty times on a busy machine

UNIT_CPU_S = 2.0
"""Most processor time of one call of a unit test in `make fast`. Not time by the clock, which a busy machine stretches."""
_BESIDE_OTHERS = 2.5
"""As many times that where other tiers run beside it, which share caches and cores."""
_OF_OTHER_TIERS = ("contract", "accept", "real_model")
_started: list[str] = []


logging.getLogger().addHandler(LOGGED)
gc.disable()  # until all tests are collected: their imports make millions of objects that stay
_IS_STARTED_BY_XDIST = "PYTEST_XDIST_WORKER" in os.environ


def _leave() -> None:
    """Let a process that xdist has started leave without taking millions of objects apart: it has told all that it found.

    What is registered early comes late, after what Ray and other packages, still to be imported, have to do at the end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if _IS_STARTED_BY_XDIST:
    atexit.register(_leave)


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later look for garbage; pytest's own at its end would take seconds.

    It is given back last, for extension modules that complain of what is never freed.
    """
    gc.freeze()
    # What is frozen does not count, so that all the rest would be looked through again and again while a test makes many records.
    gc.set_threshold(100_000, 20, 20)
    gc.enable()
    if not _IS_STARTED_BY_XDIST:
        atexit.register(gc.unfreeze)


_FONTS = "fc-list"
"""What matplotlib starts when it is imported for the first time on a machine, to find fonts."""
_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"})


def _on_audit(event: str, arguments: tuple[object, ...]) -> None:
    # Millions of events a run: most are none of these.
    if event in _STARTS and not (arguments and arguments[0] == _FONTS):
        _started.append(f"{event} {arguments[0] if arguments else ''}")


sys.addaudithook(_on_audit)


def _is_fast(config: pytest.Config) -> bool:
    return "not contract" in str(config.option.markexpr)


def _is_unit(item: pytest.Item) -> bool:
    if is_all():
        return False
    return item.nodeid.startswith("tests/unit/") and not any(item.get_closest_marker(name) for name in _OF_OTHER_TIERS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail a unit test that starts a process or takes too long; every test's processor time stands in the JUnit file."""
    _started.clear()
    before = time.process_time()
    try:
        result = yield
    finally:
        if LOGGED.records:
            item.add_report_section("call", "log", LOGGED.text)
    cpu_s = time.process_time() - before
    item.user_properties.append(("cpu_s", round(cpu_s, 3)))
    if _is_unit(item):
        assert not _started, f"a unit test starts no process, see the marker `contract`: {_started}"
        most_s = UNIT_CPU_S if _is_fast(item.config) else UNIT_CPU_S * _BESIDE_OTHERS
        assert cpu_s <= most_s, f"{cpu_s:.1f} s of processor time, a unit test takes {most_s} at most"
    return result


@pytest.fixture(autouse=True, scope="module")
def _leaves_nothing_open() -> Iterator[None]:
    """Look for garbage at the end of every file: what was left open fails a test there, not whichever runs when it is found.

    What stays, such as modules and what they keep, need not be looked through at the end of every later file. Nor does a Ray
    that a file has joined stay for the next one.
    """
    yield
    gc.collect()
    gc.freeze()
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()  # whoever joined one: the next file finds a process without


@pytest.fixture(autouse=True, scope="session")
def _leaves_nothing_open_for_later(pytestconfig: pytest.Config) -> Iterator[None]:
    """Look once more after the last test through all that stayed at the end of a file: what became garbage since then.

    It takes a second or two, which `make fast` leaves to `make test`.
    """
    yield
    if not _is_fast(pytestconfig):
        gc.unfreeze()
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _host_is_known() -> None:
    """Look once, before any test, at what the host is and offers programs: what asks for it first would start processes."""
    platform.platform()  # the client of endpoints names it in every request
    sandbox.probe_levels()


@pytest.fixture
def logged() -> Logged:
    """What the test has logged."""
    return LOGGED


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """Leave dmoa's logger as it was, as commands set its level for their whole process, and nothing that was logged."""
    root, logger = logging.getLogger(), logging.getLogger("dmoa")
    level, handlers = logger.level, list(logger.handlers)
    yield
    if logger.level != level:  # to set it clears what every logger of the process knows of its own
        logger.setLevel(level)
    logger.handlers[:] = handlers
    if LOGGED not in root.handlers:  # ray.serve.llm, where vLLM is installed, puts handlers of its own in place of all
        root.addHandler(LOGGED)
    LOGGED.clear()


_TOGETHER = (
    ("tests/integration/", "tests/cluster/"),
    ("tests/vllm/test_entropy.py", "tests/vllm/test_tools.py", "tests/vllm/test_thoughts.py"),
)
"""Files of one process, where they run one after the other: what starts a Ray, and what shares an engine of vLLM."""


class _TogetherInOneProcess(LoadFileScheduling):
    """Deals out files of tests; some go together to one process."""

    def _split_scope(self, nodeid: str) -> str:
        return next((str(files) for files in _TOGETHER if nodeid.startswith(files)), super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | EachScheduling:
    """Have `--numprocesses` deal out tests as above; `--no-loadscope-reorder` keeps the order of the command line.

    With `--dist=each` every process runs all that it collects, which is its own share of the files, see below.
    """
    return EachScheduling(config, log) if config.getoption("dist") == "each" else _TogetherInOneProcess(config, log)


def pytest_configure_node(node: WorkerController) -> None:
    """Tell a process whether it has a share of the files; what `--dist` says does not reach it."""
    node.workerinput["has_share"] = node.config.getoption("dist") == "each"


_SHARES = (("core", "training"), ("agents", "cli", "evaluation"))
"""Folders of unit tests that one process each of `make fast` has; another one has the rest. Files of a folder import much the
same, which takes seconds a process; the rest waits a good deal, so that its share of the work is smaller."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--dist=each`, let a process collect its own share of the folders: to collect all of them takes each 16 seconds."""
    mine = getattr(config, "workerinput", None)
    if mine is None or not mine["has_share"] or collection_path.parent != Path(__file__).parent / "unit":
        return None
    if not (collection_path.is_dir() or collection_path.name.startswith("test_")):
        return None
    share = next((place for place, names in enumerate(_SHARES) if collection_path.name in names), len(_SHARES))
    is_other = share % int(mine["workercount"]) != int(mine["workerid"].removeprefix("gw"))
    return is_other or None


_SHORT_S = 0.005
"""What lasts less is not in pytest's list of the slowest either."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """In a process that xdist has started, tell less of every test: not that it starts, nor a short set-up that passed."""
    if not _IS_STARTED_BY_XDIST:
        return None
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when != "setup" or not report.passed or report.duration >= _SHORT_S:
            item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a report of what passed be short: three a test go from process to process."""
    report = yield
    if report.passed:
        report.keywords, report.sections = {}, []
    return report
