"""Training in process, end to end: what is learned, what is kept, what goes on, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmoa import checkpoint
from dmoa.agents.pool import fingerprint
from dmoa.config import Config
from dmoa.core.calibration import ALPHAS, ONE_FIRST
from dmoa.core.inference import Decider
from dmoa.errors import ConfigError, DmoaError
from dmoa.testing import AGENTS, domain_rows, write_rollouts
from dmoa.testing import CONTEXT_DIM as DIM
from dmoa.testing import scripted_pool as pool
from dmoa.training.collect import silent_agents
from dmoa.training.distributed import SingleWorker
from dmoa.training.loop import train_gate
from dmoa.training.options import TrainOptions
from dmoa.training.rollouts import RolloutFolder, read_manifest
from dmoa.training.state import RunState, StateStore, TrainProgress
from dmoa.training.trainer import Curves, build_start, check_rollouts, prepare_training
from dmoa.types import RouteRequest
from tests.unit.offline_runs import Synced, synced
from tests.unit.training.in_process import BASE, FINISH_TIMEOUT_S, train


class StoppedError(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def config() -> Config:
    return pool()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    return write_rollouts(tmp_path_factory.mktemp("rollouts") / "dense", domain_rows(steps=2), config)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(folder / "checkpoint")[0].state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_gate_learns_who_is_sure_where(rollouts: Path, config: Config, tmp_path: Path) -> None:
    result = train(tmp_path / "run", rollouts, config, epochs=30, lr=3e-3)
    assert result.record.metrics["surest_share"] == 1.0
    assert result.record.metrics["ndcg"] > 0.97
    curve = [epoch.held_loss for epoch in result.report.epochs]
    assert curve[-1] is not None
    assert curve[0] is not None
    assert curve[-1] < curve[0] - 0.08
    assert max(result.report.load.values()) < 0.6


@pytest.mark.contract
def test_the_alphas_are_the_given_ones_or_chosen_by_the_price_of_an_agent(rollouts: Path, config: Config, tmp_path: Path) -> None:
    given = train(tmp_path / "given", rollouts, config, alpha="0.3").record.metrics
    assert (given["alpha"], given["theta_alpha"]) == (0.3, 0.3)
    both = train(tmp_path / "both", rollouts, config, alpha=0.3, theta_alpha=0.2).record.metrics
    assert (both["alpha"], both["theta_alpha"]) == (0.3, 0.2)
    for score, price in (("anchored", 100.0), ("posterior", 1.0)):
        free = train(tmp_path / f"free-{score}", rollouts, config, score=score, agent_price=0.0).record.metrics
        dear = train(tmp_path / f"dear-{score}", rollouts, config, score=score, agent_price=price).record.metrics
        assert dear["agents"] < 1.2
        assert free["agents"] > dear["agents"]
    with pytest.raises(ConfigError, match="agent_price is 100; with score posterior it is a gain of probability, 0 to 1"):
        train(tmp_path / "none", rollouts, config, agent_price=100.0)


@pytest.mark.parametrize(("alpha", "seen"), [("often", "'often'"), ("1.5", "'1.5'"), (0, "0")])
def test_an_alpha_that_is_none_is_refused(alpha: Any, seen: str) -> None:
    with pytest.raises(ConfigError, match=rf"train: alpha.* is {seen}"):
        TrainOptions.parse({**BASE, "rollouts": "r", "out": "o", "alpha": alpha})


def test_the_checkpoint_is_served_as_it_was_trained(rollouts: Path, config: Config, tmp_path: Path) -> None:
    result = train(tmp_path / "run", rollouts, config, epochs=30, lr=3e-3)
    gate, record = checkpoint.load(result.checkpoint)
    checkpoint.check_pool(record, fingerprint=fingerprint(config), agents=config.agent_names, preset="default")
    assert record.trained_on is not None
    assert record.trained_on["queries"] == 24
    assert record.parent is None
    assert record.activation["theta"] == gate.spec.theta is not None
    assert 0 < record.activation["mass"] <= 1
    assert record.metrics["alpha"] in (*ALPHAS, ONE_FIRST)
    assert record.metrics["theta_alpha"] in ALPHAS
    assert 1 <= record.metrics["agents"] <= gate.spec.max_agents
    first = next(value for value in domain_rows(steps=2) if value["step"] == 0 and value["agent"] == "one")
    x = np.concatenate([first["context"], first["feedback"]])
    (decision,) = Decider(gate, record.version).decide([RouteRequest(input_X=x)])
    assert decision.agents[decision.ranking[0]] == "one"


def test_a_seed_repeats_bit_for_bit_and_another_does_not(rollouts: Path, config: Config, tmp_path: Path) -> None:
    versions = [
        train(tmp_path / name, rollouts, config, seed=seed, epochs=2).record.version
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert versions[0] == versions[1] != versions[2]


def test_files_in_another_order_change_nothing(config: Config, tmp_path: Path) -> None:
    rows = domain_rows()
    one = write_rollouts(tmp_path / "one", rows, config, files=1)
    many = write_rollouts(tmp_path / "many", rows[::-1], config, files=5)
    results = [train(tmp_path / f"run-{folder.name}", folder, config, epochs=2) for folder in (one, many)]
    assert results[0].record.version == results[1].record.version


def test_labels_beside_the_rollouts_change_nothing(config: Config, tmp_path: Path) -> None:
    rows, rng = domain_rows(), np.random.default_rng(5)
    labels = [{"query_id": value["query_id"], "label": value["agent"]} for value in rows]
    found = []
    for name in ("right", "shuffled"):
        folder = write_rollouts(tmp_path / name / "rollouts", rows, config)
        dealt = labels if name == "right" else [labels[i] for i in rng.permutation(len(labels))]
        (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, dealt)))
        (tmp_path / name / "labels").mkdir()
        (tmp_path / name / "labels" / "gold.jsonl").write_text("\n".join(map(json.dumps, dealt)))
        train(tmp_path / name / "run", folder, config, epochs=3)
        found.append(weights_of(tmp_path / name / "run"))
    assert same(*found)


@pytest.mark.parametrize("score", ["raw", "anchored"])
def test_texts_and_sources_are_not_read(score: str, config: Config, tmp_path: Path) -> None:
    rows = domain_rows()
    other = [value | {"text": "The answer is 7.", "source": "elsewhere", "split": "test"} for value in rows]
    versions = [
        train(tmp_path / f"run{n}", write_rollouts(tmp_path / f"rollouts{n}", part, config), config, epochs=1, score=score)
        for n, part in enumerate((rows, other))
    ]
    assert versions[0].record.version == versions[1].record.version


@pytest.mark.contract
@pytest.mark.parametrize("core", ["gru", "reset", "linear", "mlp"])
@pytest.mark.parametrize("head", ["linear", "profile"])
def test_every_core_and_head_learns(core: str, head: str, rollouts: Path, config: Config, tmp_path: Path) -> None:
    result = train(tmp_path / "run", rollouts, config, core=core, head=head, epochs=40, lr=3e-3, patience=40)
    assert (result.record.head, checkpoint.load(result.checkpoint)[0].spec.core) == (head, core)
    # Chance is a third. 10 of 12 is what a linear map makes of 18 queries once later steps have feedback, as real ones do.
    assert result.record.metrics["surest_share"] > 0.8


@pytest.mark.contract
@pytest.mark.parametrize("loss", ["soft", "hard", "hinge", "listnet"])
@pytest.mark.parametrize("score", ["raw", "anchored"])
def test_every_loss_and_score_learns(loss: str, score: str, rollouts: Path, config: Config, tmp_path: Path) -> None:
    result = train(tmp_path / "run", rollouts, config, loss=loss, score=score, epochs=30, lr=3e-3, patience=30)
    assert result.record.metrics["surest_share"] > 0.9  # of twelve held-back steps one may be off; by chance it is a third
    spec = checkpoint.load(result.checkpoint)[0].spec
    assert spec.score == score
    assert (spec.anchors is None) == (score == "raw")
    assert result.record.anchor_set is not None
    assert len(result.record.anchor_set.means) == len(AGENTS)


def test_the_paper_preset_reads_one_embedding_and_has_no_theta(tmp_path: Path) -> None:
    config = pool(gate="{preset: paper, hidden: 8}")
    rows = [value | {"context": value["context"][:DIM]} for value in domain_rows()]
    result = train(tmp_path / "run", write_rollouts(tmp_path / "rollouts", rows, config), config, epochs=20, lr=3e-3)
    assert result.record.metrics["surest_share"] > 0.9
    assert result.record.activation["theta"] is None
    assert (result.record.score, result.record.preset) == ("raw", "paper")  # as the paper has it, where nothing is said


# Going on


class StoppingStore(StateStore):
    """Stops the training once so many states are kept, as a killed process would: with nothing else written."""

    def __init__(self, place: str, num_states: int) -> None:
        super().__init__(place)
        self._left = num_states

    def write(self, state: RunState) -> None:
        super().write(state)
        self._left -= 1
        if not self._left:
            raise StoppedError


def stopped_after(folder: Path, num_states: int, rollouts: Path, config: Config, **options: Any) -> None:
    """Train for so many epochs, and stop."""
    wanted = TrainOptions.parse({**BASE, "rollouts": str(rollouts), "out": folder, **options})
    start = build_start(wanted, config)
    job = prepare_training(wanted, start, check_rollouts(wanted, start), on_ray=False).job
    store = StoppingStore(str(folder / "state"), num_states)
    store.check()
    with pytest.raises(StoppedError):
        train_gate(job, SingleWorker(torch.device("cpu")), store, keep_share=math.inf)  # every epoch is kept


@pytest.mark.parametrize("stops", [(1,), (2, 3)])
def test_a_stopped_training_goes_on_and_ends_as_if_unbroken(
    stops: tuple[int, ...], rollouts: Path, config: Config, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", rollouts, config, epochs=7)
    for epochs in stops:
        stopped_after(tmp_path / "broken", epochs, rollouts, config, epochs=7)
    assert not (tmp_path / "broken" / "checkpoint").exists()
    said: list[str] = []
    broken = train(tmp_path / "broken", rollouts, config, epochs=7, said=said)
    assert f"going on after epoch {sum(stops)}" in said
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))
    timeless = {"seconds"}
    assert [e.model_dump(exclude=timeless) for e in broken.report.epochs] == [
        e.model_dump(exclude=timeless) for e in whole.report.epochs
    ]
    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines if line["op"] == "log" and line["step"]) == list(range(1, 8))


@pytest.mark.contract
def test_the_curves_of_a_stopped_training_are_whole_when_they_are_synced(
    rollouts: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch is on the server once, and the command on a finished training tells W&B nothing."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    out, options = tmp_path / "run", {"epochs": 5, "track": "wandb"}
    wanted = TrainOptions.parse({**BASE, "rollouts": str(rollouts), "out": out, **options})
    start = build_start(wanted, config)
    job = prepare_training(wanted, start, check_rollouts(wanted, start), on_ray=False).job
    curves = Curves(wanted, config.name, job.identity, FINISH_TIMEOUT_S)
    with curves.follow(StateStore(str(out / "state")), lambda epoch: None):
        stopped_after(out, 2, rollouts, config, **options)
    curves.close()
    train(out, rollouts, config, **options)
    runs = synced(out)
    assert len({run.group for run in runs.values()}) == 1
    assert [row["train_loss"] for row in rows_by_step(runs)] == [epoch.train_loss for epoch in progress_of(out).epochs]
    assert sum("held/ndcg" in row for run in runs.values() for row in run.rows) == 1
    lines = (out / "metrics.jsonl").read_bytes()
    train(out, rollouts, config, **options)
    assert synced(out) == runs
    assert (out / "metrics.jsonl").read_bytes() == lines


def rows_by_step(runs: dict[str, Synced]) -> list[dict[str, Any]]:
    """The epochs of all runs together, by step."""
    found = [(step, row) for run in runs.values() for step, row in zip(run.steps, run.rows, strict=True) if "train_loss" in row]
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def progress_of(out: Path) -> TrainProgress:
    progress = StateStore(str(out / "state")).read_progress()
    assert progress is not None
    return progress


class CountingStore(StateStore):
    """Notes after which epochs a state was kept."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.kept: list[int] = []

    def write(self, state: RunState) -> None:
        super().write(state)
        self.kept.append(len(state.progress.epochs))


@pytest.mark.parametrize(("share", "kept"), [(1e-9, [1, 7]), (math.inf, [1, 2, 3, 4, 5, 6, 7])])
def test_states_are_kept_as_often_as_they_are_worth_and_at_the_end(
    share: float, kept: list[int], rollouts: Path, config: Config, tmp_path: Path
) -> None:
    wanted = TrainOptions.parse({**BASE, "rollouts": str(rollouts), "out": tmp_path / "run", "epochs": 7})
    start = build_start(wanted, config)
    store = CountingStore(str(tmp_path / "run" / "state"))
    store.check()
    job = prepare_training(wanted, start, check_rollouts(wanted, start), on_ray=False).job
    train_gate(job, SingleWorker(torch.device("cpu")), store, keep_share=share)
    assert store.kept == kept


def test_a_finished_training_is_not_repeated(rollouts: Path, config: Config, tmp_path: Path) -> None:
    first = train(tmp_path / "run", rollouts, config, epochs=2)
    said: list[str] = []
    again = train(tmp_path / "run", rollouts, config, epochs=2, said=said)
    assert any("already trained" in text for text in said)
    assert again.record.version == first.record.version


def test_other_options_or_rollouts_in_the_same_folder_are_refused(rollouts: Path, config: Config, tmp_path: Path) -> None:
    train(tmp_path / "run", rollouts, config, epochs=2)
    before = weights_of(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lr: begun with 0\.001, now 0\.5"):
        train(tmp_path / "run", rollouts, config, epochs=2, lr=0.5)
    others = write_rollouts(tmp_path / "others", domain_rows(seed=9), config)
    with pytest.raises(ConfigError, match="rollouts: begun with"):
        train(tmp_path / "run", others, config, epochs=2)
    assert same(weights_of(tmp_path / "run"), before)


def test_anchors_of_another_versions_fit_are_refused_in_the_same_folder(rollouts: Path, config: Config, tmp_path: Path) -> None:
    train(tmp_path / "run", rollouts, config, epochs=2, score="anchored")
    store = StateStore(str(tmp_path / "run" / "state"))
    state = store.read()
    assert state is not None
    identity = state.progress.identity | {"targets": "eta 0.5, anchors [-1.25, -1, -0.75]"}
    store.write(RunState(state.progress.model_copy(update={"identity": identity}), state.tensors))
    with pytest.raises(ConfigError, match=r"targets: begun with eta .*anchors .*, now eta"):
        train(tmp_path / "run", rollouts, config, epochs=2, score="anchored")


def test_a_second_round_goes_on_from_a_checkpoint(rollouts: Path, config: Config, tmp_path: Path) -> None:
    first = train(tmp_path / "first", rollouts, config, epochs=4)
    second = train(tmp_path / "second", rollouts, config, epochs=1, start_from=tmp_path / "first" / "checkpoint")
    assert second.record.parent == first.record.version
    assert second.report.epochs[0].train_loss is not None
    assert first.report.epochs[0].train_loss is not None
    assert second.report.epochs[0].train_loss < first.report.epochs[0].train_loss
    with pytest.raises(ConfigError, match="hidden is 24; the checkpoint to start from has 16"):
        train(tmp_path / "third", rollouts, config, hidden=24, start_from=tmp_path / "first" / "checkpoint")


# Early stopping, bad steps


def test_training_ends_when_the_held_back_loss_stops_falling(rollouts: Path, config: Config, tmp_path: Path) -> None:
    result = train(tmp_path / "run", rollouts, config, epochs=400, lr=0.05, patience=3)
    losses = [epoch.held_loss for epoch in result.report.epochs]
    best = int(np.argmin(np.array(losses, dtype=float)))
    assert len(losses) == best + 1 + 3 < 400
    assert result.report.ended == "no lower held-back loss for 3 epochs"
    assert result.record.metrics["best_epoch"] == best + 1
    assert result.record.metrics["held_loss"] == losses[best]


def poisoned(tmp_path: Path, config: Config) -> Path:
    """Rollouts in which one query that is learned from overflows the gate."""
    rows = domain_rows()
    rows = [value | {"context": np.full(2 * DIM, 3e38, np.float32)} if value["query_id"] == "q005" else value for value in rows]
    return write_rollouts(tmp_path / "poisoned", rows, config)


def test_batches_that_are_not_finite_are_skipped_and_counted(config: Config, tmp_path: Path) -> None:
    result = train(tmp_path / "run", poisoned(tmp_path, config), config, epochs=6, batch_queries=1, core="linear")
    assert [epoch.bad_steps for epoch in result.report.epochs] == list(range(1, 7))
    assert result.report.epochs[0].updates == 17
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / "run").values())


def test_too_many_bad_batches_fail_the_run_and_keep_the_state(config: Config, tmp_path: Path) -> None:
    rollouts, options = poisoned(tmp_path, config), {"epochs": 6, "batch_queries": 1, "core": "linear", "max_bad_steps": 2}
    stopped_after(tmp_path / "run", 2, rollouts, config, **options)
    with pytest.raises(DmoaError, match="not finite in 3 updates, max_bad_steps is 2"):
        train(tmp_path / "run", rollouts, config, **options)
    progress = StateStore(str(tmp_path / "run" / "state")).read_progress()
    assert progress is not None
    assert (len(progress.epochs), progress.bad_steps, progress.ended) == (2, 2, None)
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("lr", "message"),
    [(1e20, "logits of held-back queries are not finite; lower lr, which is 1e"), (1e30, "not finite after epoch 1; lower lr")],
)
def test_a_gate_that_gives_no_numbers_is_no_checkpoint(
    lr: float, message: str, rollouts: Path, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(DmoaError, match=message):
        train(tmp_path / "run", rollouts, config, lr=lr, epochs=2)
    assert not (tmp_path / "run" / "checkpoint").exists()


# Refusals


def test_rollouts_of_another_pool_are_refused_by_agent(rollouts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only in the rollouts: three; only in the pool: four"):
        train(tmp_path / "run", rollouts, pool(("one", "two", "four")))


def test_a_truncated_file_is_named_and_the_checkpoint_stays(rollouts: Path, config: Config, tmp_path: Path) -> None:
    train(tmp_path / "run", rollouts, config, epochs=1)
    before = weights_of(tmp_path / "run")
    damaged = Path(shutil.copytree(rollouts, tmp_path / "damaged"))
    part = damaged / "rollouts" / "part-1.parquet"
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"part-1\.parquet: not a whole Parquet file"):
        train(tmp_path / "run", damaged, config, epochs=1)
    assert same(weights_of(tmp_path / "run"), before)


Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:3], "1 queries; training and holding back need two"),
        (lambda rows: [value | {"context": value["context"][:10]} for value in rows], "the gate reads 772"),
        (lambda rows: [value | {"entropy_sum_nats": float("nan")} for value in rows], "expected finite numbers"),
        (lambda rows: [*rows, rows[0]], "is there twice"),
        (lambda rows: [value | {"num_steps": 2} for value in rows], r"has steps \[0\] of 2"),
        (lambda rows: [value | {"num_steps": 1 << 60} for value in rows], rf"has steps \[0\] of {1 << 60}"),  # at once
        (lambda rows: [value for value in rows if value["agent"] == "one"], "hold no pair of scores"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused(change: Change, message: str, config: Config, tmp_path: Path) -> None:
    folder = write_rollouts(tmp_path / "rollouts", change(domain_rows(6)), config, files=1)
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", folder, config, score="raw")


def test_rollouts_of_another_preset_are_refused(rollouts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset is 'default'"):
        train(tmp_path / "run", rollouts, pool(gate="{preset: paper}"))


def test_anchored_scores_need_dense_rollouts(config: Config, tmp_path: Path) -> None:
    sparse = [value | {"propensity": 0.1} if value["agent"] == "two" else value for value in domain_rows()]
    folder = write_rollouts(tmp_path / "rollouts", [value for value in sparse if value["agent"] != "three"], config)
    with pytest.raises(ConfigError, match="anchors need dense steps"):
        train(tmp_path / "run", folder, config, score="anchored")
    with pytest.raises(ConfigError, match="it needs 8 dense steps to learn from, and these rollouts have 0"):
        train(tmp_path / "run", folder, config)
    result = train(tmp_path / "run", folder, config, epochs=1, score="raw")
    assert result.record.activation["theta"] is None
    dense = write_rollouts(tmp_path / "dense", domain_rows(seed=4), config)
    result = train(tmp_path / "anchored", folder, config, epochs=1, score="anchored", anchor_rollouts=dense)
    assert result.record.anchor_set is not None
    assert result.record.anchor_set.rows == 24


def test_a_state_that_is_damaged_is_named(rollouts: Path, config: Config, tmp_path: Path) -> None:
    train(tmp_path / "run", rollouts, config, epochs=1)
    path = tmp_path / "run" / "state" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"cannot be read: .*remove state\.safetensors"):
        train(tmp_path / "run", rollouts, config, epochs=1)


def test_a_folder_that_cannot_be_written_is_refused(rollouts: Path, config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        train(tmp_path / "file" / "run", rollouts, config)


def test_an_agent_whose_every_call_failed_is_found(tmp_path: Path, config: Config) -> None:
    lost = {"status": "failed", "entropy_tokens": 0, "text": "", "error": "status 401"}
    rows = [{**row, **lost} if row["agent"] == "two" or row["query_id"] == "q000" else row for row in domain_rows()]
    folder = write_rollouts(tmp_path / "dense", rows, config)
    assert silent_agents(RolloutFolder(folder), read_manifest(folder)) == {"two": "status 401"}
    never_asked = write_rollouts(tmp_path / "sparse", [row for row in rows if row["agent"] == "one"], config)
    assert silent_agents(RolloutFolder(never_asked), read_manifest(never_asked)) == {}
