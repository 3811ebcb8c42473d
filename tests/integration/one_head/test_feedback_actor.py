"""A feedback actor whose snapshot cannot be read when it starts: nothing is lost, and nothing waits for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.integration.evaluations import run

ROOT = Path(__file__).parents[3]
DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
import ray
from dmoa.feedback import write_feedback
from dmoa.serving.actors import pack_record, unpack_record
from dmoa.serving.feedback import FeedbackActor, FeedbackStore, buffer_of
from dmoa.testing import scripted_pool
from tests.unit.serving.test_feedback_buffer import made

def names(records):
    return [record.answer.trace_id for record in records]

state, config = Path(sys.argv[1]), scripted_pool()
config = config.model_copy(update={"router": config.router.model_copy(update={"state_uri": state.as_uri()})})
kept = buffer_of(config)
kept.put(made(1))
FeedbackStore(state.as_uri()).save(write_feedback(kept.records()), kept.state())
file = state / "feedback" / "queries.parquet"
whole = file.read_bytes()
file.unlink()
file.symlink_to("/proc/self/mem")  # it is there, and no read of it succeeds
ray.init(log_to_driver=False)
actor = ray.remote(FeedbackActor).options(num_cpus=0).remote(config.model_dump_json(), "unread")
life, count, _ = ray.get(actor.newest.remote("", 0))
ray.get(actor.put.remote(pack_record([replace(made(2), created_unix_s=9.0)])))
ray.get(actor.save.remote())
print(bool(life), count, file.is_symlink())
file.unlink()
file.write_bytes(whole)
ray.get(actor.save.remote())
later, _, packed = ray.get(actor.newest.remote(life, 0))
print(later != life, names(unpack_record(packed)), names(FeedbackStore(state.as_uri()).load()[0]))
"""


def test_a_snapshot_that_cannot_be_read_at_the_start_is_kept_and_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    ran = run([sys.executable, "-c", DRIVER, str(tmp_path / "state")], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == ["True 0 True", "True ['mine1', 'mine2'] ['mine1', 'mine2']"]
