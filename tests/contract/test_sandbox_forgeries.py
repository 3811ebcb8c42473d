# ruff: noqa: E501 programs in strings
"""Candidates that try to pass their checker without being right, each a test of its own."""

from __future__ import annotations

import pytest

from dmoa.evaluation.benchmarks import humaneval
from dmoa.evaluation.records import Label, Reply
from dmoa.sandbox import Program, SandboxResult, run_checked
from dmoa.sandbox.launch import SandboxLimits
from tests.contract import sandbox_programs as more

CHECKER = """
import math
def check(candidate):
    assert candidate(2, 2) == 4
    assert abs(candidate(1, 2) - 3) < 1e-9
    assert math.isclose(candidate(0.5, 0.5), 1.0)
check(add)
"""
WRONG = "def add(a, b): return a - b\n"
LIMITS = SandboxLimits(wall_s=20.0, cpu_s=10, memory_bytes=512 << 20)


def judged(candidate: str, checker: str = CHECKER) -> SandboxResult:
    return run_checked(Program(source=candidate), checker, LIMITS)


# Each defines `add` wrongly.
FORGERIES = {
    "leave-at-import": WRONG + "import os; os._exit(0)",
    "leave-in-the-call": "import os\ndef add(a, b): os._exit(0)",
    "sys-exit-at-import": WRONG + "import sys; sys.exit(0)",
    "sys-exit-in-the-call": "import sys\ndef add(a, b): sys.exit(0)",
    "exit-builtin": "def add(a, b): exit(0)",
    "raise-system-exit-in-a-comparison": "class R:\n def __eq__(s, o): raise SystemExit(0)\ndef add(a, b): return R()",
    "leave-at-exit": WRONG + "import atexit, os; atexit.register(os._exit, 0)",
    "leave-in-a-finaliser": WRONG + "import os\nclass D:\n def __del__(s): os._exit(0)\nkeep = D()",
    "leave-from-a-thread": WRONG + "import os, threading; threading.Timer(0.0, os._exit, (0,)).start()",
    "leave-from-an-alarm": """
import os, signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0)); signal.setitimer(signal.ITIMER_REAL, 0.001)
def add(a, b):
    while True: pass
""",
    "leave-from-an-excepthook": WRONG
    + "import os, sys; sys.excepthook = lambda *_: os._exit(0); sys.unraisablehook = sys.excepthook",
    "leave-from-an-audit-hook": WRONG + "import os, sys; sys.addaudithook(lambda *_: os._exit(0)); open('x', 'w')",
    "leave-through-exec": "import os\ndef add(a, b): os.execv('/bin/true', ['true'])",
    "leave-the-parent-of-a-fork": "import os\nif os.fork(): os._exit(0)\n" + WRONG,
    "leave-the-child-of-a-fork": "import os\nif not os.fork(): os._exit(0)\n" + WRONG,
    "die-of-a-signal": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGKILL)",
    "kill-the-guard": WRONG
    + "import os, signal\nfor p in (1, os.getppid()):\n try: os.kill(p, signal.SIGKILL)\n except OSError: pass",
    "print-success": WRONG + "print('ok'); print('PASSED'); print('ended 0 0.0 0')",
    "write-success-everywhere": WRONG
    + """
import os
for fd in range(1, 256):
    for text in (b"ok", b"started\\nended 0 0.0 0\\n", bytes(32), b"passed"):
        try: os.write(fd, text)
        except OSError: pass
os._exit(0)
""",
    "copy-every-pipe-to-every-other": WRONG
    + """
import os
for a in range(3, 64):
    for b in range(3, 64):
        try: os.set_blocking(a, False); os.write(b, os.read(a, 64))
        except OSError: pass
os._exit(0)
""",
    "close-every-descriptor": WRONG + "import os; os.closerange(0, 256)",
    "replace-every-descriptor": WRONG + "import os\nfor fd in range(3, 32):\n try: os.dup2(1, fd)\n except OSError: pass",
    "replace-assertion-error": WRONG + "import builtins; builtins.AssertionError = type('Quiet', (Warning,), {})",
    "replace-abs": "import builtins; builtins.abs = lambda x: 0\ndef add(a, b): return 4 if a == b == 2 else 1.0 if a == 0.5 else 9",
    "replace-abs-in-the-call": """
import builtins
def add(a, b):
    builtins.abs = lambda x: 0
    return 4 if a == 2 else 1.0 if a == 0.5 else 9
""",
    "replace-isclose": "import math; math.isclose = lambda *a, **k: True\ndef add(a, b): return a + b if isinstance(a, int) else 0",
    "replace-exec-and-compile": WRONG + "import builtins; builtins.exec = builtins.compile = builtins.__import__ = print",
    "replace-the-builtins-of-the-globals": WRONG + "__builtins__ = {'abs': lambda x: 0, 'print': print}",
    "replace-os-write": WRONG + "import os, posix; os.write = posix.write = lambda fd, data: os._exit(0)",
    "replace-the-standard-streams": WRONG + "import sys, io; sys.stdout = sys.stderr = sys.__stdout__ = io.StringIO()",
    "replace-the-main-module": WRONG + "import sys, types; sys.modules['__main__'] = types.ModuleType('__main__')",
    "define-check-first": WRONG + "def check(candidate): pass",
    "keep-replacing-check": WRONG
    + """
import threading
def loop():
    while True: globals()['check'] = lambda candidate: None
threading.Thread(target=loop, daemon=True).start()
""",
    "skip-lines-by-tracing": """
import sys
def add(a, b):
    def skip(frame, event, arg):
        if frame.f_code.co_name == 'check': frame.f_lineno = frame.f_code.co_firstlineno + 3
        return skip
    sys.settrace(skip)
    return 0
""",
    "profile-hook": "import os, sys\ndef add(a, b):\n sys.setprofile(lambda *_: os._exit(0))\n return 0",
    "rewrite-the-caller": "import sys\ndef add(a, b):\n f = sys._getframe(1); f.f_globals['abs'] = lambda x: 0; f.f_trace = None\n return 4",
    "rewrite-the-caller-through-inspect": "import inspect\ndef add(a, b):\n inspect.stack()[1].frame.f_globals['math'] = None\n return 4",
    "rewrite-the-caller-through-a-traceback": """
def add(a, b):
    try: raise ValueError
    except ValueError as e: frame = e.__traceback__.tb_frame.f_back
    frame.f_globals['abs'] = lambda x: 0
    return 4
""",
    "rewrite-the-caller-through-a-generator": """
def add(a, b):
    def g(): yield h.gi_frame.f_back.f_back
    h = g()
    next(h).f_globals['abs'] = lambda x: 0
    return 4
""",
    "rewrite-the-caller-under-a-false-name": """
import os
code = compile("import sys\\ndef up(): return sys._getframe(2)", os.__file__, "exec")
exec(code)
def add(a, b):
    up().f_globals['abs'] = lambda x: 0
    return 4
""",
    "rename-the-code": """
import os, sys
def up(): return sys._getframe(2)
up.__code__ = up.__code__.replace(co_filename=os.__file__)
def add(a, b):
    up().f_globals['abs'] = lambda x: 0
    return 4
""",
    "find-the-token-with-gc": WRONG
    + """
import gc, os
for thing in gc.get_objects():
    for part in gc.get_referents(thing):
        if isinstance(part, bytes) and len(part) == 32:
            for fd in range(3, 64):
                try: os.write(fd, part)
                except OSError: pass
os._exit(0)
""",
    "find-the-token-in-frames-of-a-signal": """
import os, signal
def hunt(number, frame):
    while frame is not None:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            values = value.values() if isinstance(value, dict) else [value]
            for part in values:
                if isinstance(part, bytes) and len(part) == 32: os.write(claim, part)
                if isinstance(part, int) and 2 < part < 64: descriptors.add(part)
        frame = frame.f_back
    for fd in descriptors:
        try: os.write(fd, os.read(fd - 1, 32))
        except OSError: pass
    os._exit(0)
claim, descriptors = 3, set()
signal.signal(signal.SIGALRM, hunt)
def add(a, b):
    signal.raise_signal(signal.SIGALRM)
""",
    "find-the-job": WRONG
    + """
import os, sys
for module in list(sys.modules.values()):
    job = getattr(module, 'j', None)
    if isinstance(job, dict): os.write(job['claim_fd'], os.read(job['token_fd'], 32))
os._exit(0)
""",
    "read-memory-with-ctypes": "import ctypes\ndef add(a, b): return ctypes.string_at(id(a), 8) and 4",
    "read-memory-through-proc": "def add(a, b):\n open('/proc/self/mem', 'rb')\n return 4",
    "forge-a-code-object": "import marshal, types\ndef add(a, b):\n marshal.loads(marshal.dumps(add.__code__))\n return 4",
    "refuse-to-be-compared": "class R:\n def __eq__(s, o): return NotImplemented\ndef add(a, b): return R()",
    "swallow-errors-in-a-class": "class add:\n def __new__(c, a, b): return 0\n def __exit__(s, *a): return True",
    "guess-by-forks": """
import os
def add(a, b):
    for guess in (4, 3, 1.0):
        pid = os.fork()
        if pid == 0: return guess
        if os.waitpid(pid, 0)[1] == 0: os._exit(0)
    return 0
""",
    "guess-by-forks-of-a-library": """
import multiprocessing, os
real, os._exit = os._exit, lambda code: None
def add(a, b):
    for guess in (4, 3, 1.0):
        process = multiprocessing.get_context('fork').Process(target=print)
        process.start()
        if multiprocessing.current_process().name != 'MainProcess': return guess
        process.join()
        if process.exitcode == 0: real(0)
    return 0
""",
    "bring-a-module": "import sys, types\nm = types.ModuleType('math'); m.isclose = lambda *a: True\nsys.modules['math'] = m\ndef add(a, b): return a + b if isinstance(a, int) else 0",
    "change-the-class-of-a-module": """
import math, types
class M(types.ModuleType):
    def __getattribute__(s, n): return (lambda *a: True) if n == 'isclose' else super().__getattribute__(n)
math.__class__ = M
def add(a, b): return a + b if isinstance(a, int) else 0
""",
    "rewrite-the-caller-through-logging": """
import logging
def add(a, b):
    f = logging.currentframe()
    while f.f_code.co_filename != '<checker>': f = f.f_back
    f.f_globals['abs'] = lambda x: 0
    return 4 if a == 2 else 1.0 if a == 0.5 else 9
""",
    "rewrite-the-caller-through-asyncio": """
import asyncio
async def up():
    f = asyncio.current_task().get_stack()[-1]
    while f.f_code.co_filename != '<checker>': f = f.f_back
    return f
def add(a, b):
    asyncio.run(up()).f_globals['abs'] = lambda x: 0
    return 4 if a == 2 else 1.0 if a == 0.5 else 9
""",
    "syntax-error": "def add(a, b) return a + b",
    "end-the-text-early": WRONG + "'''\n",
    "equal-everything": """
class R(float):
    def __eq__(s, o): return True
    __sub__ = __rsub__ = __abs__ = lambda s, o=None: R(0)
    def __lt__(s, o): return True
def add(a, b): return R(1) if a == 0.5 else R(9)""",
    "equal-everything-as-numpy": """
import numpy as np
class R(np.ndarray):
    def __eq__(s, o): return True
    def __sub__(s, o): return s
    def __abs__(s): return 0
    def __float__(s): return 1.0
def add(a, b): return np.zeros(1).view(R)""",
    "patch-and-take-back": """
import math
kept = math.isclose
def add(a, b):
    if a != 0.5: return a + b
    def yes(*x, **k):
        math.isclose = kept
        return True
    math.isclose = yes
    return 0""",
    "frames-of-a-signal": """
import signal
def see(n, f):
    while f:
        if f.f_code.co_filename == '<checker>': f.f_globals['abs'] = lambda x: 0
        f = f.f_back
signal.signal(signal.SIGALRM, see)
def add(a, b):
    signal.raise_signal(signal.SIGALRM)
    return {2: 4, 1: 9}.get(a, 1.0)""",
    "speak-for-the-checker": WRONG
    + """
import os, json
def tell(value):
    text = json.dumps(value).encode(); text = len(text).to_bytes(8, 'big') + text
    for fd in range(3, 64):
        try: os.write(fd, text)
        except OSError: pass
for value in ({"value": ["dict", []]}, {"value": True}, {"raised": ["SystemExit", "0", ""]}, {"raised": ["StopIteration", "", ""]}):
    tell(value)""",
    "message-without-end": "import os\ndef add(a, b):\n for fd in range(3, 64):\n  try: os.write(fd, b'\\xff' * 64)\n  except OSError: pass",
    "nested-without-end": "def add(a, b):\n x = []\n x.append(x)\n return x",
    "shadow-the-checkers-module": "open('math.py', 'w').write('isclose = lambda *a: True')\ndef add(a, b): return a + b if isinstance(a, int) else 0",
} | more.FORGERIES


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_does_not_pass(name: str) -> None:
    result = judged(FORGERIES[name])
    assert result.status in ("failed", "killed"), result


def test_a_right_candidate_passes() -> None:
    result = judged("def add(a, b): return a + b")
    assert (result.status, result.checker) == ("ok", "apart")


LOOK = """
import gc, os, re, sys, ctypes
sought = re.compile(b"the one that nobody kno[w]s")
def found():
    told = [str(o) for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list, tuple))]
    frame = sys._getframe()
    while frame:
        told += map(repr, frame.f_locals.values())
        frame = frame.f_back
    for fd in range(3, 64):
        try: told.append(str(os.pread(fd, 10000, 0)))
        except OSError: pass
    if any(sought.search(text.encode('utf-8', 'replace')) for text in told): return True
    for line in map(str.split, open('/proc/self/maps')):
        first, last = (int(part, 16) for part in line[0].split('-'))
        if 'rw' in line[1] and sought.search(ctypes.string_at(first, last - first)): return True
    return False
"""


def test_the_expected_values_are_not_in_the_candidates_memory() -> None:
    """Every object, frame, descriptor and readable page of the candidate's process, while it is called."""
    checker = "expected = 'the one that nobody knows'\nassert found() is False\n"
    result = run_checked(Program(source=LOOK), checker, LIMITS)
    assert result.status == "ok", result


@pytest.mark.parametrize(
    ("value", "is_same"),
    [
        (
            "(1, [2.5, None, True], {'a': {3, 4}}, b'x', 1j, 'ü\\ud800', 10 ** 5000 % 7 ** 4000, {(1, 2): frozenset([5])})",
            "x == ({})",
        ),
        ("float('nan')", "x != x"),
        ("__import__('collections').Counter('aab')", "x == {{'a': 2, 'b': 1}}"),
        ("__import__('numpy').float64(2.5)", "x == 2.5 and type(x) is float"),
        ("__import__('numpy').int64(7)", "x == 7"),
        ("__import__('enum').IntEnum('E', 'a b').b", "x == 2"),
        ("lambda y: lambda z: y + z", "x(3)(4) == 7"),
        ("int", "x('12') == 12"),
    ],
    ids=["plain", "nan", "counter", "numpy-float", "numpy-int", "enum", "functions", "class"],
)
def test_values_arrive_as_what_they_hold(value: str, is_same: str) -> None:
    result = judged(f"x = {value}", f"import sys\nassert {is_same.format(value)}")
    assert result.status == "ok", result


def test_an_error_arrives_as_its_built_in_kind() -> None:
    checker = "try: f(0)\nexcept ZeroDivisionError as e: assert 'zero' in str(e)\nelse: assert False\nf([])"
    result = judged("class Own(KeyError): pass\ndef f(x):\n if x == []: raise Own('k')\n return 1 / x", checker)
    assert result.status == "failed"
    assert "<candidate>, line 3, in f: if x == []: raise Own('k')" in result.stderr
    assert "KeyError" in result.stderr


def test_an_error_cannot_end_the_checkers_loop() -> None:
    """`map` in the checker would take a StopIteration for the end of the rows."""
    result = judged("def f(x): raise StopIteration", "for row in map(f, [1, 2]): assert row == 3")
    assert result.status == "failed"
    assert "StopIteration" in result.stderr


def test_what_cannot_be_carried_is_named() -> None:
    result = judged("class Box: pass\ndef f(): return Box()", "f()")
    assert "a Box cannot be carried between a candidate and its checker; use built-in types" in result.stderr


def test_a_wrong_candidate_is_told_why() -> None:
    result = judged(WRONG)
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "assert candidate(2, 2) == 4" in result.stderr


@pytest.mark.parametrize(
    "program",
    [
        "print('hello'); import logging, warnings, collections, enum, dataclasses\nP = collections.namedtuple('P', 'x')",
        "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()",
        "import warnings; warnings.warn('w'); import logging; logging.warning('l'); logging.getLogger('x').error('e', stack_info=True)",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nassert A(1) == A(1)",
        "from unittest.mock import Mock, patch; assert Mock(return_value=1)() == 1\nimport logging.config, pathlib, statistics, typing, inspect\ninspect.signature(add), inspect.getmembers(add)",
        "from typing import NamedTuple\nclass P(NamedTuple):\n  x: int\nimport traceback; traceback.print_stack(); traceback.format_stack()",
        "import asyncio\nasync def f(): await asyncio.gather(asyncio.sleep(0), asyncio.wait_for(asyncio.sleep(0), 1))\nasyncio.run(f())",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "open('helper.py', 'w').write('x = 1'); import helper; assert helper.x == 1",
        "import pandas as pd; assert pd.DataFrame({'a': [1, 2]}).query('a > 1').shape == (1, 1)",
        "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(1, 1)\nunittest.main(argv=['x'], exit=False)",
    ],
    ids=[
        "imports",
        "traceback",
        "warnings",
        "dataclass",
        "mock",
        "stack",
        "asyncio",
        "thread",
        "own-module",
        "pandas",
        "unittest",
    ],
)
def test_what_honest_programs_do_is_allowed(program: str) -> None:
    result = judged("def add(a, b): return a + b\n" + program)
    assert result.status == "ok", result


# (modules of the checker, its assertion, the patch): without the patch the assertion fails.
PATCHES = {
    "numpy": ("import numpy as np", "np.testing.assert_allclose(x, 1)", "np.testing.assert_allclose = lambda *a, **k: None"),
    "numpy-by-code": (
        "import numpy as np",
        "np.testing.assert_allclose(x, 1)",
        "np.testing.assert_allclose.__wrapped__.__code__ = (lambda *args, **kwds: None).__code__ "
        "if hasattr(np.testing.assert_allclose, '__wrapped__') else 1 / 0",
    ),
    "numpy-by-defaults": (
        "import numpy as np",
        "np.testing.assert_allclose(x, 1)",
        "f = np.testing.assert_allclose; f = getattr(f, '__wrapped__', f); f.__defaults__ = (9.0, *f.__defaults__[1:])",
    ),
    "a-module-that-is-not-there": (
        "try:\n    import not_there\nexcept ImportError:\n    not_there = None",
        "assert x == 1 or not_there",
        "import sys, types; sys.modules['not_there'] = types.ModuleType('not_there')",
    ),
    "numpy-by-builtin": ("import numpy as np", "assert np.allclose(x, 1)", "np.allclose = print; np.allclose = lambda *a: True"),
    "pandas": (
        "import pandas as pd",
        "pd.testing.assert_series_equal(pd.Series([x]), pd.Series([1]))",
        "pd.testing.assert_series_equal = pd._testing.assert_series_equal = lambda *a, **k: None",
    ),
    "pandas-by-method": (
        "import pandas as pd",
        "assert pd.Series([x]).equals(pd.Series([1]))",
        "pd.Series.equals = lambda a, b: True",
    ),
    "unittest": (
        "import unittest",
        "unittest.TestCase().assertEqual(x, 1)",
        "unittest.TestCase.assertEqual = lambda *a: None",
    ),
    "random": ("import random", "random.seed(1); assert random.random() == x", "random.random = lambda: 2"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_library_does_not_pass(name: str) -> None:
    imports, assertion, patch = PATCHES[name]
    patched = f"{imports}\nx = 2\n{patch}\n"
    before = judged(patched, f"{imports}\n{assertion}")
    inside = judged("", f"{imports}\nscope = {{}}\nexec({patched!r}, scope)\nx = scope['x']\n{assertion}")
    assert (before.status, inside.status) == ("failed", "failed"), (before, inside)
    right = "import random; random.seed(1); x = random.random()" if name == "random" else "x = 1"
    assert judged(right, f"{imports}\n{assertion}").status == "ok"


STACK = "import traceback as t; print(t.StackSummary.extract(t.walk_stack(None), capture_locals=True))"


def test_a_program_run_by_its_checker_cannot_read_the_expected_result() -> None:
    """The way of DS-1000: the candidate is a text that the checker runs."""
    checker = """
def test(code):
    expected = 41 + 1
    scope = {}
    exec(code, scope)
    assert scope["result"] == expected
test(%r)
"""
    assert judged("", checker % "result = 42").status == "ok"
    for way in ("import sys; frame = sys._getframe(1)", "import inspect; frame = inspect.currentframe().f_back", STACK):
        result = judged("", checker % f"{way}; result = frame.f_locals['expected']")
        assert (result.status, "the sandbox refuses" in result.stderr) == ("failed", True)


def test_a_completion_cannot_replace_the_prompts_helpers() -> None:
    """The tests of HumanEval/38 and 50 code a text with the prompt's own function, which a completion could define anew."""
    prompt = 'def code(s: str) -> str:\n    return s[::-1]\n\n\ndef decode(s: str) -> str:\n    """Undo code."""\n'
    test = "def check(f):\n    assert f(code('abc')) == 'abc'\n"
    gold = {"prompt": prompt, "test": test, "entry_point": "decode", "canonical_solution": "    return code(s)\n"}
    score = humaneval.entry(allow_weak_sandbox=True).score
    texts = ("```python\n    return code(s)\n```", "```python\ncode = str\ndef decode(s):\n    return s\n```")
    label = Label(row_id="0", benchmark="humaneval", gold=gold)
    assert [score(label, Reply(text=text)).value for text in texts] == [1.0, 0.0]
