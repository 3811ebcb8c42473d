"""Records cross processes as the values of their fields, whoever made them."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

from dmoa import types
from dmoa.testing import Say, decision, said
from dmoa.types import AgentReply, Stop, TokenUsage

RECORDS = [one for _, one in inspect.getmembers(types, dataclasses.is_dataclass) if one.__module__ == types.__name__]


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_record_is_the_same_on_the_other_side(protocol: int) -> None:
    reply = dataclasses.replace(said("a", Say(text="1", nats=0.5)), usage=TokenUsage(prompt_tokens=3, completion_tokens=2))
    for sent in (reply, TokenUsage(reasoning_tokens=1), Stop(reason="schedule")):
        got = pickle.loads(pickle.dumps(sent, protocol))
        assert got == sent
        assert type(got) is type(sent)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(got, dataclasses.fields(got)[0].name, "other")


def test_a_record_of_arrays_is_the_same_on_the_other_side() -> None:
    sent = decision({"a": 0.75, "b": 0.25}, 1)
    got = pickle.loads(pickle.dumps(sent))
    for field in dataclasses.fields(sent):
        np.testing.assert_equal(getattr(got, field.name), getattr(sent, field.name))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_the_state_of_every_record_is_that_of_its_dataclass(kind: Any) -> None:
    """The slow reference: what `dataclasses` gives a class of the same fields; either reads the other's pickles."""
    values = {field.name: f"{number}" for number, field in enumerate(dataclasses.fields(kind))}
    sent, plain = object.__new__(kind), dataclasses.make_dataclass("Plain", values, frozen=True, slots=True)(**values)
    for name, value in values.items():
        object.__setattr__(sent, name, value)
    assert list(sent.__getstate__()) == plain.__getstate__()
    got = object.__new__(kind)
    got.__setstate__(plain.__getstate__())
    assert {name: getattr(got, name) for name in values} == values


def test_a_state_of_other_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        object.__new__(AgentReply).__setstate__(("a",))  # type: ignore[attr-defined]
