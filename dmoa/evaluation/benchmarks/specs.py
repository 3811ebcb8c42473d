"""The nine benchmarks, and the one table of where their splits come from.

Where upstream has no rows for a split, a file is divided by the hash of each row's family: 60 % train, 40 % adaptation.
A family is one row, or the rows that must stay together (equal questions of MultiArith, one body of SVAMP, variations of
one DS-1000 problem). HotpotQA's and DDXPlus's validation rows are the test slice, AQuA's validation rows the adaptation slice.
"""

from __future__ import annotations

from collections.abc import Mapping

from dmoa.errors import ConfigError
from dmoa.evaluation.benchmarks import ddxplus
from dmoa.evaluation.benchmarks.aqua_rat import AquaRow
from dmoa.evaluation.benchmarks.arithmetic import Gsm8kRow, MultiArithRow, SvampRow
from dmoa.evaluation.benchmarks.ds1000 import Ds1000Row
from dmoa.evaluation.benchmarks.hotpotqa import HotpotRow
from dmoa.evaluation.benchmarks.humaneval import HumanEvalRow
from dmoa.evaluation.benchmarks.mmlu import MmluRow
from dmoa.evaluation.benchmarks.upstream import RowSpec, Slice, UpstreamRow, model_parser
from dmoa.evaluation.records import Split

TRAIN_SHARE = 0.6


def _divided(test_file: str) -> dict[Split, Slice]:
    return {
        "train": Slice(file="train", high=TRAIN_SHARE),
        "adaptation": Slice(file="train", low=TRAIN_SHARE),
        "test": Slice(file=test_file),
    }


def _own(train: str, adaptation: str, test: str) -> dict[Split, Slice]:
    return {"train": Slice(file=train), "adaptation": Slice(file=adaptation), "test": Slice(file=test)}


def _plain(name: str, model: type[UpstreamRow], slices: Mapping[Split, Slice]) -> RowSpec:
    return RowSpec(name=name, parse=model_parser(model), slices=slices)


_SPECS = (
    _plain("mmlu", MmluRow, _own("dev", "validation", "test")),
    _plain("gsm8k", Gsm8kRow, _divided("test")),
    _plain("multiarith", MultiArithRow, _divided("test")),
    _plain("svamp", SvampRow, _divided("test")),
    _plain("aqua_rat", AquaRow, _own("train", "validation", "test")),
    _plain("humaneval", HumanEvalRow, _divided("test")),
    _plain("ds1000", Ds1000Row, _divided("test")),
    _plain("hotpotqa", HotpotRow, _divided("validation")),
    RowSpec(
        name="ddxplus",
        parse=ddxplus.parse,
        slices=_divided("validation"),
        definitions=(ddxplus.EVIDENCES_FILE, ddxplus.CONDITIONS_FILE),
        read_definitions=ddxplus.read_definitions,
    ),
)
BENCHMARKS: dict[str, RowSpec] = {spec.name: spec for spec in _SPECS}


def spec_of(name: str) -> RowSpec:
    """The benchmark of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark {name!r} is not known; take one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
