"""Comparisons at equal budgets: the budget, how it holds within a step, repeats, and the table's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmoa.dispatch import Dispatcher
from dmoa.errors import ConfigError, DmoaError, RequestError
from dmoa.evaluation.answering import Asking, query_of_task
from dmoa.evaluation.figures import Footnotes, curves, overall, untrained_policies
from dmoa.evaluation.records import BenchmarkInfo, CompareOptions, EvaluateOptions, Matching, Task
from dmoa.evaluation.repeats import mean_answer, merge_repeats
from dmoa.evaluation.report import accuracy_against, pareto, render_report, routing
from dmoa.evaluation.results import build_evaluation, read_evaluation
from dmoa.evaluation.run import finish_run
from dmoa.evaluation.run_folder import RunFolder
from dmoa.policies.registry import POLICIES
from dmoa.testing import (
    Fail,
    FakeAgents,
    Say,
    Schedule,
    answer_of,
    answered,
    asks,
    card,
    orchestrator_of,
    query,
    run_info,
    scored,
    scripted_pool,
    write_run,
)
from dmoa.testing import failed as lost
from dmoa.types import Limits, Price
from dmoa.workflows.compare import against, check_curve, remarks, run_comparison, share_of_budget, taken, with_baselines
from dmoa.workflows.console import Bars, Common
from dmoa.workflows.evaluate import build_evaluation as build_evaluation_of
from dmoa.workflows.evaluate import check_policies, expand_policies

TASK = Task(row_id="gsm8k/test/1", benchmark="gsm8k", text="?")


def test_the_budget_is_the_mean_of_what_the_reference_took() -> None:
    lines = [
        answered("gsm8k", number, "dmoa", prompt_tokens=tokens, completion_tokens=1, calls=calls, wall_ms=500.0, price=0.25)
        for number, (tokens, calls) in enumerate([(10, 1), (20, 2), (30, 2)])
    ]
    expected = {
        "tokens": {"budget_tokens": 21},
        "calls": {"budget_calls": 2},
        "latency": {"deadline_s": 0.5},
        "price": {"budget_price": 0.25},
    }
    for by, limits in expected.items():
        assert Matching(by=by, reference="dmoa").budget("gsm8k", lines) == limits  # type: ignore[arg-type]
    assert Matching(by="tokens", reference="dmoa", amount=7.0).budget("gsm8k", []) == {"budget_tokens": 7}
    unknown = [*lines, answered("gsm8k", 4, "dmoa", price=None)]
    with pytest.raises(DmoaError, match=r"--match price: what dmoa takes on gsm8k is not known: 3 of 4 answered rows"):
        Matching(by="price", reference="dmoa").budget("gsm8k", unknown)


def test_a_reference_that_costs_nothing_sets_no_budget() -> None:
    free = [answered("gsm8k", number, "dmoa", price=price) for number, price in enumerate((0.0, 0.0, 0.3))]
    assert Matching(by="price", reference="dmoa").budget("gsm8k", free) == {"budget_price": pytest.approx(0.1)}
    with pytest.raises(DmoaError, match="what dmoa takes on gsm8k is nothing, and nobody could spend as much"):
        Matching(by="price", reference="dmoa").budget("gsm8k", free[:2])


COMMON = Common(config=None, overrides=(), verbosity=0, json_path=None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"curve": "0..3"}, "--adversaries is 3, and the pool has 2 agents"),
        ({"match": "price"}, r"--match is price, and llms\.s has no price"),
        ({"policies": "bandit:data=/a b.jsonl"}, "holds white space"),
        ({"policies": "dmoa,knn_router:data=lost.jsonl"}, "policy: data: cannot read 'lost.jsonl'"),
        ({"policies": "dmoa,knapsack:rewards=lost.jsonl"}, "policy: rewards: cannot read 'lost.jsonl'"),
        ({"policies": f"dmoa,gptswarm:seed=1:data={__file__}"}, r"policy: data: .*test_matching\.py, line 1: "),
    ],
)
def test_what_cannot_be_compared_is_said_before_hours_of_work(values: dict[str, str], said: str, tmp_path: Path) -> None:
    options = CompareOptions.parse({"benchmarks": "arith", "out": str(tmp_path / "run"), **values})
    with pytest.raises(DmoaError, match=said):
        run_comparison(options, scripted_pool(("a", "b")), COMMON, "dmoa compare")
    assert not (tmp_path / "run").exists()


def test_under_a_budget_of_agents_the_gates_queries_alone_take_fewer_places(tmp_path: Path) -> None:
    """`--budget cpu` has the gate ask two; the others go on asking as many at once as ever, and take as many places."""
    policies = ("dmoa", "dense", "moa", "self_consistency:k=9", "single")
    options = EvaluateOptions(benchmarks=("arith",), policies=policies, budget="cpu", out=tmp_path / "run")
    with Bars(-1) as bars:
        made = build_evaluation_of(options, scripted_pool("abcde"), ("arith",), RunFolder(tmp_path / "run"), COMMON, bars, "")
    assert made.workers.widths == {"dmoa": 2, "dense": 5, "moa": 5, "self_consistency:k=9": 9, "single": 1}


def test_a_matched_budget_lowers_the_limits_of_its_benchmark_alone() -> None:
    limits = Limits(max_steps=3, budget_tokens=50)
    asking = Asking(seed=0, limits=limits, budgets={"gsm8k": {"budget_tokens": 60, "deadline_s": 2.0}})
    matched = query_of_task(TASK, "dense", asking).limits
    assert (matched.budget_tokens, matched.deadline_s, matched.within_steps) == (50, 2.0, True)
    assert query_of_task(TASK.model_copy(update={"benchmark": "svamp"}), "dense", asking).limits == limits
    calls = query_of_task(TASK, "dense", replace(asking, budgets={"gsm8k": {"budget_calls": 2}})).limits
    assert (calls.budget_calls, calls.within_steps) == (2, False), "the pool's own budgets are the reference's too"


# A call takes 10 + 4 tokens; its price is 1 + 2.
@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        ({"budget_tokens": 14}, ["a"]),
        ({"budget_tokens": 41}, ["ab"]),
        ({"budget_tokens": 42}, ["abc"]),
        ({"budget_tokens": 70}, ["abcd", "a"]),
        ({"budget_tokens": 1}, ["a"]),
        ({"budget_price": 8.9}, ["ab"]),
        ({"budget_price": 9.0}, ["abc"]),
        ({"budget_price": 9.0, "budget_tokens": 28}, ["ab"]),
    ],
)
async def test_a_paced_budget_holds_within_a_step(limits: dict[str, float], asked: list[str]) -> None:
    agents = FakeAgents({name: (Say(text=f"{name}1"), Say(text=f"{name}2")) for name in "abcd"})
    orchestrator = orchestrator_of(agents, "abcd", price=Price(prompt_per_1m=1e5, completion_per_1m=5e5))
    answer = await answer_of(orchestrator, query(within_steps=True, max_steps=2, **limits), Schedule(asks(*"abcd")))
    assert ["".join(sorted(step.active)) for step in answer.steps] == asked
    assert answer.stop_reason.startswith("budget_") or len(asked) == 2


@pytest.mark.parametrize(("limits", "asked"), [({"budget_tokens": 28}, "abc"), ({"budget_price": 6.0}, "abc")])
async def test_a_call_that_was_lost_says_nothing_of_what_the_others_take(limits: dict[str, float], asked: str) -> None:
    """The first agent is lost and took nothing: the others are still asked by what is left, two of them here."""
    agents = FakeAgents({"a": Fail()} | {name: Say(text=name) for name in "bcd"})
    orchestrator = orchestrator_of(agents, "abcd", price=Price(prompt_per_1m=1e5, completion_per_1m=5e5))
    await answer_of(orchestrator, query(within_steps=True, max_steps=1, **limits), Schedule(asks(*"abcd")))
    assert [call.agent for call in agents.calls] == list(asked)


@pytest.mark.parametrize("limits", [{"budget_tokens": 29}, {"budget_price": 6.5}])
async def test_a_matched_budget_cuts_no_reply(limits: dict[str, float]) -> None:
    """The budget is a mean, and half of the reference's own replies are longer: whoever is asked may say as much."""
    agents = FakeAgents({name: Say(text=name) for name in "abc"})
    orchestrator = orchestrator_of(agents, "abc", price=Price(prompt_per_1m=1e5, completion_per_1m=5e5))
    for asked in (query(within_steps=True, max_steps=2, **limits), query(max_steps=1)):
        await answer_of(orchestrator, asked, Schedule(asks(*"abc")))
    *paced, free_a, _, _ = agents.calls
    assert [call.agent for call in paced] == ["a", "b"]
    assert {call.sampling for call in paced} == {free_a.sampling}, "else the call cache would not find what others asked"


async def test_a_paced_budget_of_price_goes_by_what_each_agent_costs() -> None:
    """A call of a costs 3, and so would one of b; c is ten times as dear, and what is left does not pay for it."""
    agents = FakeAgents({name: Say(text=name) for name in "abc"})
    orchestrator = orchestrator_of(agents, "abc", price=Price(prompt_per_1m=1e5, completion_per_1m=5e5))
    cards = orchestrator.dispatcher.cards | {"c": card("c", price=Price(prompt_per_1m=1e6, completion_per_1m=5e6))}
    dispatcher = Dispatcher(agents=agents, cards=cards, router=None, is_select=True)
    asked = query(within_steps=True, max_steps=1, budget_price=20.0)
    await answer_of(replace(orchestrator, dispatcher=dispatcher), asked, Schedule(asks(*"abc")))
    assert [call.agent for call in agents.calls] == ["a", "b"]


async def test_agents_that_a_budget_of_calls_leaves_out_stand_in_for_lost_ones() -> None:
    agents = FakeAgents({"a": Fail(), "b": Say(text="Answer: 19")})
    answer = await answer_of(orchestrator_of(agents, "ab"), query(budget_calls=1), Schedule(asks("a", "b")))
    assert (answer.text, [call.agent for call in agents.calls]) == ("Answer: 19", ["a", "b"])


async def test_without_pace_all_agents_of_a_step_are_asked_at_once() -> None:
    agents = FakeAgents({name: Say(text=name) for name in "abcd"})
    answer = await answer_of(orchestrator_of(agents, "abcd"), query(budget_tokens=14, max_steps=1), Schedule(asks(*"abcd")))
    assert len(answer.steps[0].active) == 4


def test_repeats_are_one_run_of_means(tmp_path: Path) -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=2)], policies=("dmoa",), budgets={"gsm8k": {"budget_tokens": 30}})
    parts = [
        write_run(
            tmp_path / f"repeat-{number}",
            info.model_copy(update={"budgets": {"gsm8k": {"budget_tokens": 30 + 2 * number}}}),
            [answered("gsm8k", row, "dmoa", prompt_tokens=10 * (number + 1), price=float(number), calls=2) for row in (0, 1)],
            [scored("gsm8k", 0, "dmoa", float(number)), scored("gsm8k", 1, "dmoa", 1.0)],
        )
        for number in (0, 1)
    ]
    found = merge_repeats(RunFolder(tmp_path), parts)
    row = found.rows[0]
    assert (row.n, row.accuracy, row.correct, row.prompt_tokens, row.price, row.calls) == (2, 0.75, 1, 30, 1.0, 4)
    assert (found.config.repeats, found.config.budgets) == (2, {"gsm8k": {"budget_tokens": 31.0}})


def test_a_repeat_that_failed_counts_nothing_and_hides_nothing_of_the_others() -> None:
    """Of one row, by hand: calls (4 + 0 + 2) / 3, price (0.6 + 0 + 0.3) / 3, tokens (110 + 0 + 110) / 3."""
    lines = [
        answered("gsm8k", 0, "dmoa", calls=4, price=0.6),
        lost("gsm8k", 0, "dmoa"),
        answered("gsm8k", 0, "dmoa", calls=2, price=0.3),
    ]
    found = mean_answer(lines)
    assert (found.status, found.calls, found.price, found.usage.total) == ("ok", 2, pytest.approx(0.3), 74)
    assert mean_answer([*lines[:2], answered("gsm8k", 0, "dmoa")]).calls is None, "an older line does not say"
    assert mean_answer([lost("gsm8k", 0, "dmoa")] * 2).status == "failed"
    fallen = lost("gsm8k", 0, "dmoa").model_copy(update={"prompt_tokens": 9, "calls": 1})
    assert mean_answer([fallen, lines[0]]).price is None, "its tokens have no price, as in a run without repeats"


def test_calls_of_repeats_are_their_mean_and_not_the_nearest_whole_number_of_each_row() -> None:
    """Two rows of 1 and 2 calls: 1.5 a query, and half of a budget of 3."""
    lines = [mean_answer([answered("gsm8k", row, "dmoa", calls=calls) for calls in (1, 2)]) for row in (0, 1)]
    info = run_info(
        [BenchmarkInfo(name="gsm8k", rows=2)],
        policies=("dmoa",),
        match="calls",
        budgets={"gsm8k": {"budget_calls": 3}},
        repeats=2,
    )
    found = build_evaluation(info, lines, [scored("gsm8k", row, "dmoa", 1.0) for row in (0, 1)])
    (row,) = found.rows
    assert (row.calls, taken(row)[1], share_of_budget(found, row)) == (3, "1.5", "50 %")


def test_a_row_that_the_deadline_cut_in_any_repeat_is_told() -> None:
    whole, cut = answered("gsm8k", 0, "chain"), answered("gsm8k", 0, "chain", stop_reason="deadline")
    failing = lost("gsm8k", 0, "chain", "DeadlineError: too late")
    assert [mean_answer(lines).is_late for lines in ([whole, cut], [whole, failing], [whole, whole])] == [True, True, False]


def test_tables_say_whose_choice_an_untrained_gate_made() -> None:
    """`knapsack` chooses its sub-pool by the pool's gate, which its answers do not name, unless rewards are given."""
    policies = ("knapsack", "knapsack:inner=star:gpus=1", "knapsack:rewards=seen.jsonl", "moa")
    info = run_info([BenchmarkInfo(name="gsm8k", rows=1)], policies=policies, gate_version="untrained-abc")
    lines = [answered("gsm8k", 0, policy, gate_version=None) for policy in policies]
    found = build_evaluation(info, lines, [scored("gsm8k", 0, policy, 1.0) for policy in policies])
    assert untrained_policies(found) == set(policies[:2])


def test_tables_say_who_learnt_from_labels() -> None:
    by_file, by_rewards = "knn_router:data=seen.jsonl:k=3", "knapsack:rewards=seen.jsonl"
    policies = (by_file, by_rewards, "dmoa", "dmoa:told", "moa")
    info = run_info([BenchmarkInfo(name="gsm8k", rows=1)], policies=policies)
    versions = {"dmoa": "abc", "dmoa:told": "outcomes-20-abc"}
    lines = [answered("gsm8k", 0, policy, gate_version=versions.get(policy)) for policy in policies]
    found = build_evaluation(info, lines, [scored("gsm8k", 0, policy, 1.0) for policy in policies])
    notes = Footnotes(found)
    (note,) = notes.all()
    assert note.text == "it learnt from labels: judged replies, or outcomes"
    assert [row.policy for row in found.rows if notes.marks(row)] == [by_file, by_rewards, "dmoa:told"]


def test_the_table_says_what_each_policy_took_and_how_it_differs_from_the_reference() -> None:
    info = run_info(
        [BenchmarkInfo(name="gsm8k", rows=2)],
        policies=("dmoa", "single"),
        match="tokens",
        reference="dmoa",
        budgets={"gsm8k": {"budget_tokens": 20}},
    )
    counts = {"prompt_tokens": 8, "completion_tokens": 2, "calls": 3, "wall_ms": 1500.0, "price": 0.5}
    lines = [answered("gsm8k", row, policy, **counts) for policy in info.policies for row in (0, 1)]
    scores = [scored("gsm8k", row, policy, float(policy == "single")) for policy in info.policies for row in (0, 1)]
    found = build_evaluation(info, lines, scores)
    dmoa, single = found.rows
    assert against(found, single, "dmoa") == ("+100.0", "0.500")
    assert against(found, dmoa, "dmoa") == ("-", "-")
    assert taken(single) == ("10", "3.0", "1.50", "0.5")
    assert share_of_budget(found, single) == "50 %"


def test_figures_per_query_are_over_all_rows_that_were_asked() -> None:
    """Six of ten rows can be judged here; all ten were asked, and took 110 tokens each."""
    budgets = {"ds1000": {"budget_tokens": 110}}
    info = run_info([BenchmarkInfo(name="ds1000", rows=10)], match="tokens", reference="dmoa", budgets=budgets)
    lines = [answered("ds1000", row, policy, calls=2, price=0.5) for policy in info.policies for row in range(10)]
    scores = [
        scored("ds1000", row, policy, float(row >= 4), is_left_out=row < 4, is_scored=row >= 4)
        for policy in info.policies
        for row in range(10)
    ]
    found = build_evaluation(info, lines, scores)
    row = found.rows[1]
    assert (row.n, row.left_out, row.asked) == (6, 4, 10)
    assert (taken(row), share_of_budget(found, row)) == (("110", "2.0", "0.25", "0.5"), "100 %")
    assert (row.tokens_per_correct, row.price_per_correct) == (110.0, 0.5)
    assert overall(found)[1].tokens == "110"
    older = row.model_copy(update={"asked": 0})
    assert taken(older) == taken(row)


def test_seconds_of_calls_from_the_cache_are_marked_and_not_drawn() -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=2)], reference="dmoa", match="tokens")
    cells = [(policy, row) for policy in info.policies for row in (0, 1)]
    lines = [answered("gsm8k", row, policy, memoised_tokens=9 * (policy == "single")) for policy, row in cells]
    found = build_evaluation(info, lines, [scored("gsm8k", row, policy, 1.0) for policy, row in cells])
    assert [taken(row)[2] for row in found.rows] == ["0.25", "0.25*"]
    assert remarks(found) == ["* part of the calls came from the call cache: their tokens count, their seconds do not"]
    assert "Left out where calls came from the call cache, which take no time: single." in render_report(found)
    seconds, tokens = (accuracy_against(found, measure) or "" for measure in ("seconds", "tokens"))
    assert ("single" in tokens, "single" in seconds, "dmoa" in seconds) == (True, False, True)


def test_rows_that_a_matched_deadline_cut_are_told() -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=3)], reference="dmoa", match="latency")
    lines = [answered("gsm8k", row, "dmoa") for row in range(3)]
    lines += [answered("gsm8k", 0, "single"), answered("gsm8k", 1, "single", stop_reason="deadline"), lost("gsm8k", 2, "single")]
    found = build_evaluation(info, lines, [])
    assert remarks(found) == ["dmoa set the deadline and answered without it; rows that it cut: single on gsm8k 2 of 3"]


def test_schedules_are_run_to_their_end_and_the_gates_steps_are_as_ever() -> None:
    asking = Asking(seed=0, limits=Limits(max_steps=3), ends_schedules=True)
    steps = {
        policy: query_of_task(TASK, policy, asking).limits.max_steps
        for policy in (
            "dmoa",
            "single:a",
            "dense",
            "smoa:layers=9",
            "chain",
            "escalate",
            "knapsack",
            "capacity_aware",
            "capacity_aware:window=9:inner=moa",
        )
    }
    assert {policy for policy, most in steps.items() if most == 3} == {"dmoa", "single:a", "dense", "capacity_aware"}
    assert set(steps.values()) == {3, 4200}  # `chain` takes as many steps as agents, which are 4,096 at most
    assert query_of_task(TASK, "smoa", Asking(seed=0, limits=Limits(max_steps=3))).limits.max_steps == 3


def test_accuracy_is_told_by_the_number_of_adversaries_and_the_defence(tmp_path: Path) -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=4)], policies=("dmoa", "moa"))
    folder = write_run(tmp_path, info, [], [])
    for count, defence, right in ((0, "none", 4), (1, "none", 2), (1, "agreement", 3)):
        changes = {"options": {"adversaries": count, "kind": "liar", "defence": defence}}
        lines = [answered("gsm8k", row, policy) for policy in info.policies for row in range(4)]
        scores = [scored("gsm8k", row, "dmoa", float(row < right)) for row in range(4)]
        scores += [scored("gsm8k", row, "moa", 0.0) for row in range(4)]
        write_run(folder.curve(count, defence), info.model_copy(update=changes), lines, scores)
    found = finish_run(folder)
    dmoa = [(row.defence, row.adversaries, row.accuracy, row.tokens) for row in found.robustness if row.policy == "dmoa"]
    assert dmoa == [("agreement", 1, 0.75, 110.0), ("none", 0, 1.0, 110.0), ("none", 1, 0.5, 110.0)]
    assert {(row.agents, row.kind) for row in found.robustness} == {(2, "liar")}
    (line,) = [line for line in curves(found) if (line.policy, line.defence) == ("dmoa", "none")]
    assert line.shown[1].startswith("50.0 [")
    page = folder.report.read_text(encoding="utf-8")
    assert "Agents that work against the swarm" in page
    assert 'aria-label="robustness-gsm8k"' in page
    assert read_evaluation(tmp_path) == found


def test_numbers_of_adversaries_are_written_as_a_range_or_a_list() -> None:
    def curve(words: str) -> tuple[int, ...]:
        return CompareOptions.parse({"benchmarks": "arith", "curve": words}).curve

    assert [curve(words) for words in ("0..3", "0,2", "")] == [(0, 1, 2, 3), (0, 2), ()]
    with pytest.raises(ConfigError, match=r"curve is '2\.\.1'; expected N\.\.M, the smaller number first"):
        curve("2..1")
    with pytest.raises(ConfigError, match=r"curve\.1001 is 1001; expected a number less than or equal to 1000"):
        curve(f"0..{10**15}")


def test_baselines_are_added_once() -> None:
    def policies(**values: object) -> tuple[str, ...]:
        return with_baselines(CompareOptions.parse({"benchmarks": "arith", **values}))

    assert policies() == ("dmoa", "self_moa", "self_consistency:k=16", "single")
    assert policies(match="latency") == ("dmoa", "self_moa", "self_consistency", "single")
    assert policies(policies="self_consistency,best_of_n:k=3", baselines=False) == ("self_consistency", "best_of_n:k=3")
    named = policies(policies="dmoa,self_consistency:a,best_of_n:temperature=1:b,self_consistency:a:k=3", baselines=False)
    assert named[1:] == ("self_consistency:a:k=16", "best_of_n:temperature=1:b:k=16", "self_consistency:a:k=3")
    assert "single" not in policies(policies="dmoa,single:a")
    assert policies(policies="dense", baselines=False) == ("dense",)


def test_baselines_that_recorded_replies_cannot_answer_are_not_added() -> None:
    generated = scripted_pool(("a", "b"))
    llms = {name: llm.model_copy(update={"engine": "recorded"}) for name, llm in generated.llms.items()}
    recorded = generated.model_copy(update={"llms": llms})
    options = CompareOptions.parse({"benchmarks": "arith", "policies": "dmoa,majority_k"})
    added = with_baselines(options, recorded)
    assert added == ("dmoa", "majority_k", "single")
    check_policies(added, recorded)


def test_a_run_with_adversaries_that_did_not_run_is_told_by_its_folder(tmp_path: Path) -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=1)], policies=("dmoa",))
    folder = write_run(tmp_path, info, [answered("gsm8k", 0, "dmoa")], [scored("gsm8k", 0, "dmoa", 1.0)])
    write_run(folder.curve(0, "none"), info, [answered("gsm8k", 0, "dmoa")], [scored("gsm8k", 0, "dmoa", 1.0)])
    unjudged = scored("gsm8k", 0, "dmoa", 0.0, is_scored=False, is_failed=True)
    write_run(folder.curve(2, "none"), info, [lost("gsm8k", 0, "dmoa")], [unjudged])
    check_curve(CompareOptions.parse({"benchmarks": "gsm8k", "out": str(tmp_path), "curve": "0"}))
    with pytest.raises(DmoaError, match=r"^evaluation in curve/2-none: did not run: dmoa on gsm8k \(1 of 1 queries failed\)"):
        check_curve(CompareOptions.parse({"benchmarks": "gsm8k", "out": str(tmp_path), "curve": "0,2"}))


def test_what_a_server_has_is_not_known_here() -> None:
    check_policies(("review", "review:a"), None)
    with pytest.raises(DmoaError, match="'review' is not known"):
        check_policies(("review",), scripted_pool(("a", "b")))


def test_a_gate_that_no_policy_asks_is_named() -> None:
    check_policies(("dmoa:old", "dmoa"), scripted_pool(), ("old",))
    with pytest.raises(RequestError, match=r"--gates: new is in no policy; add dmoa:new to --policies"):
        check_policies(("dmoa:old", "dmoa"), scripted_pool(), ("old", "new"))


def test_all_names_every_policy_that_the_pool_can_run_without_labels() -> None:
    generated = scripted_pool(("a", "b"))
    every = expand_policies(("single:a", "all", "dense"), generated)
    labelled = {"bandit", "knn_router", "linear_router", "kmeans", "gptswarm", "g_designer"}
    assert every[0] == "single:a"
    assert len(set(every)) == len(every)
    assert set(every) == {"single:a", *POLICIES.builtin} - labelled
    assert expand_policies(("dense",), generated) == ("dense",)
    llms = {name: llm.model_copy(update={"engine": "recorded"}) for name, llm in generated.llms.items()}
    once = expand_policies(("all",), generated.model_copy(update={"llms": llms}))
    assert {"dmoa", "dense", "majority_k", "knapsack"} <= set(once)
    assert not {"moa", "debate", "selector", "bandit"} & set(once)


def test_policies_share_calls_unless_time_or_samples_are_compared() -> None:
    def shares(**values: object) -> bool:
        return CompareOptions.parse({"benchmarks": "arith", **values}).has_own_cache

    assert shares()
    assert shares(match="none")
    assert not shares(share_calls=False)
    assert not shares(match="latency")
    assert not shares(repeats=2)
    assert not shares(call_cache="c")
    assert not shares(url="http://x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"match": "none", "match_budget": 3}, "match_budget has no effect"),
        ({"match": "calls", "url": "http://x"}, "a server has no budget of calls"),
        ({"repeats": 2, "call_cache": "c"}, "cached calls do not vary"),
        ({"match": "latency", "call_cache": "c"}, "cached calls take no time"),
        ({"match_budget": 0}, "match_budget is 0"),
        ({"curve": "0..2", "repeats": 2}, "curve has its own adversaries"),
        ({"curve": "0..2", "adversaries": 1}, "curve has its own adversaries"),
        ({"curve": "0..x"}, "curve"),
        ({"kind": "saboteur"}, "no agent is an adversary"),
        ({"curve_defences": "agreement"}, "curve_defences has no effect without curve"),
        ({"curve": "0..2", "curve_defences": ""}, "curve_defences is"),
        ({"curve": "0..2", "curve_defences": "agree"}, "curve_defences"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareOptions.parse({"benchmarks": "arith", **values})


def test_the_front_holds_what_nobody_beats_in_both() -> None:
    points = [(3.0, 50.0), (1.0, 20.0), (2.0, 60.0), (1.0, 30.0), (5.0, 60.0), (6.0, 61.0)]
    assert pareto(points) == [(1.0, 30.0), (2.0, 60.0), (6.0, 61.0)]


def test_the_map_of_whom_a_policy_asks_has_room_for_long_names() -> None:
    """Else its panels are laid over their labels, of which matplotlib warns."""
    name = "support-tickets-of-the-second-quarter-by-product-and-language-en"
    info = run_info([BenchmarkInfo(name=name, rows=1)], policies=("dmoa",))
    drawn = routing(build_evaluation(info, [answered(name, 0, "dmoa")], [scored(name, 0, "dmoa", 1.0)]), "dmoa")
    assert drawn is not None
    assert "support-tickets-of-the-s" in drawn


def test_an_agent_that_is_sampled_several_times_in_a_step_is_in_one_step() -> None:
    info = run_info([BenchmarkInfo(name="gsm8k", rows=1)], policies=("self_moa",))
    found = build_evaluation(info, [answered("gsm8k", 0, "self_moa", active=(("a", "a", "b"), ("a",)))], [])
    assert [(row.step, row.agent, row.count) for row in found.routing] == [(0, "a", 1), (0, "b", 1), (1, "a", 1)]
