"""Where a generation becomes a reply: thoughts of rounds, of engines that part them, that never end; and in the decode loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from dmoa.agents.agent import Agent
from dmoa.config import AgentConfig
from dmoa.core.reasoning import ReasoningSplitter
from dmoa.engines.chat_template import opened_thought
from dmoa.engines.thoughts import has_special_marks
from dmoa.engines.transformers.decode import Running, TextStream
from dmoa.types import EntropySum, Generation, Message, TextDelta
from tests.unit.agents.conftest import tiny_tokenizer
from tests.unit.agents.test_agent import ENTROPY, QUESTION, USAGE, ListEngine, agent_of, call_of, generated

TOKENIZER = tiny_tokenizer()
THOUGHT = EntropySum(sum_nats=6.0, sq_sum=18.0, tokens=2)


async def test_text_and_thought_are_apart_and_the_thoughts_tokens_are_guessed_by_their_characters() -> None:
    reply = await agent_of(ListEngine(generated("<think>six</think>42!"))).call(call_of())
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("42!", "six", "stop")
    assert (reply.usage.completion_tokens, reply.usage.reasoning_tokens, reply.are_tokens_estimated) == (4, 2, True)
    assert reply.entropy == ENTROPY  # of the whole: nobody knows which part is the answer's
    plain = await agent_of(ListEngine(generated("42"))).call(call_of())
    assert (plain.reasoning, plain.usage.reasoning_tokens, plain.are_tokens_estimated) == ("", 0, False)


async def test_a_thought_that_never_ended_is_an_empty_contribution_that_was_cut() -> None:
    reply = await agent_of(ListEngine(generated("<think>The answer is 41"))).call(call_of())
    assert (reply.status, reply.text, reply.reasoning, reply.finish_reason) == ("ok", "", "The answer is 41", "length")
    assert reply.usage.reasoning_tokens == reply.usage.completion_tokens


@pytest.mark.parametrize("scope", ["answer", "all"])
async def test_what_an_engine_parts_is_taken_as_it_is_and_its_text_is_split_still(scope: str) -> None:
    usage = replace(USAGE, reasoning_tokens=2)
    parted = generated("<think>b</think>42", reasoning="a", reasoning_entropy=THOUGHT, usage=usage)
    config = AgentConfig.model_validate({"name": "solver", "llm": "tiny", "profile": "Solves."})
    reply = await Agent(config, ListEngine(parted), entropy_scope=scope).call(call_of())  # type: ignore[arg-type]
    assert (reply.text, reply.reasoning) == ("42", "a\n\nb")
    assert (reply.usage.reasoning_tokens, reply.are_tokens_estimated) == (2, False)
    assert reply.reasoning_entropy == THOUGHT
    assert reply.entropy == (ENTROPY if scope == "answer" else ENTROPY + THOUGHT)


async def test_thoughts_before_a_tool_call_are_kept_and_the_model_goes_on_from_them() -> None:
    engine = ListEngine(generated("<think>I add.</think>\n<calculator>12*7"), generated("It is 84."))
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=50))
    assert (reply.text, reply.reasoning) == ("<calculator>12*7</calculator> = 84\nIt is 84.", "I add.")
    assert engine.requests[1].messages[-1].content == "<think>I add.</think>\n<calculator>12*7</calculator> = 84\n"


async def test_a_tool_may_be_called_within_a_thought() -> None:
    engine = ListEngine(
        generated("", reasoning="try <calculator>12*7", raw="<think>\ntry <calculator>12*7"),
        generated("It is 84.", reasoning="so 84", raw="so 84</think>It is 84."),
    )
    reply = await agent_of(engine, ["calculator"]).call(call_of(max_tokens=50))
    assert (reply.text, reply.reasoning) == ("It is 84.", "try <calculator>12*7</calculator> = 84\nso 84")


async def test_a_stream_tells_thought_from_text() -> None:
    class Pieces(ListEngine):
        async def _items(self, request):  # type: ignore[no-untyped-def]
            yield TextDelta(text="a", is_reasoning=True)
            for piece in ("<th", "ink>b</thi", "nk>", "4", "2 <", "t"):
                yield TextDelta(text=piece)
            yield generated("<think>b</think>42 <t", reasoning="a")

    items = [item async for item in agent_of(Pieces()).stream(call_of())]
    deltas = [(item.text, item.is_reasoning) for item in items if isinstance(item, TextDelta)]
    assert deltas == [("a", True), ("b", True), ("4", False), ("2 ", False), ("<t", False)]


def finished(text: str, *, opening: str = "", stop: tuple[str, ...] = ()) -> tuple[Generation, list[int], list[TextDelta]]:
    """A text through the decode loop's own sequence, each token at as many nats as its place; and its tokens, and deltas."""
    done: list[Generation] = []
    deltas: list[TextDelta] = []
    tokens = TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids
    sequence = Running(
        tokens=TOKENIZER.backend_tokenizer.encode("q").ids,
        adapter=None,
        max_tokens=99,
        draw=None,
        text=TextStream(TOKENIZER.backend_tokenizer, stop),
        deadline_unix_s=None,
        accepted_s=0.0,
        on_text=deltas.append,
        on_done=done.append,  # type: ignore[arg-type]
        outputs=[],
        splitter=ReasoningSplitter(is_opened=bool(opening)),
        opening=opening,
    )
    for place, token in enumerate([*tokens, -1]):
        if sequence.finish is None:
            sequence.accept(token, float(place + 1), frozenset({-1}))
    sequence.end()
    return done[0], tokens, deltas


@pytest.mark.parametrize(
    ("whole", "opening", "thought"), [("<think>6 😀 7</think>42", "", "6 😀 7"), ("6 7</think>42", "<think>\n", "6 7")]
)
def test_the_decode_loop_parts_the_entropy_by_the_positions_of_the_answer(whole: str, opening: str, thought: str) -> None:
    found, tokens, deltas = finished(whole, opening=opening)
    assert (found.text, found.reasoning, found.raw) == ("42", thought, opening + whole)
    assert "".join(delta.text for delta in deltas if not delta.is_reasoning) == "42"
    assert "".join(delta.text for delta in deltas if delta.is_reasoning) == thought
    # Independently: the first token with which the decoded beginning goes past the closing tag.
    first = next(n for n in range(len(tokens)) if "</think>4" in TOKENIZER.decode(tokens[: n + 1]))
    assert found.entropy == EntropySum.of_tokens([float(n + 1) for n in range(first, len(tokens) + 1)])
    assert found.reasoning_entropy == EntropySum.of_tokens([float(n + 1) for n in range(first)])
    assert found.usage.reasoning_tokens == first
    assert found.usage.completion_tokens == len(tokens) + 1


def test_special_tokens_stay_in_the_text_where_some_mark_thoughts() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    assert not has_special_marks(tokenizer)
    tokenizer.add_special_tokens(["[THINK]", "[/THINK]"])
    assert has_special_marks(tokenizer)
    tokens = tokenizer.encode("[THINK]6[/THINK]42", add_special_tokens=False).ids
    streams = [TextStream(tokenizer, keeps_special=keeps) for keeps in (True, False)]
    assert ["".join(map(stream.push, tokens)) for stream in streams] == ["[THINK]6[/THINK]42", "642"]


def test_a_reply_without_a_thought_has_all_its_entropy() -> None:
    found, tokens, deltas = finished("a < b#x", stop=("#",))
    assert (found.text, found.reasoning, found.raw, "".join(delta.text for delta in deltas)) == ("a < b", "", "", "a < b")
    assert (found.entropy.tokens, found.reasoning_entropy, found.usage.reasoning_tokens) == (
        found.usage.completion_tokens,
        EntropySum(),
        0,
    )
    assert found.usage.completion_tokens < len(tokens)


@pytest.mark.parametrize(
    ("prompt", "begun", "expected"),
    [
        ("q\n<think>\n", "", (True, "<think>\n")),
        ("q\n<think>\n\n</think>\n\n", "", (False, "")),
        ("q\n", "", (False, "")),
        ("q\n<think>a", "<think>a", (True, "")),
        ("q\n<think>a</think>b", "<think>a</think>b", (False, "")),
    ],
)
def test_whether_the_prompt_opens_the_thought(prompt: str, begun: str, expected: tuple[bool, str]) -> None:
    tokens = TOKENIZER.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
    messages = (QUESTION, Message(role="assistant", content=begun)) if begun else (QUESTION,)
    assert opened_thought(TOKENIZER, tokens, messages) == expected
