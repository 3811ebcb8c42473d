"""The flags of every command, spelt out: they are a contract, also those that are made from records of options."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from dmoa.cli.main import app

OUTPUT = "--json:Path --quiet/-q:bool=False --verbose/-v:bool=False"
COMMON = f"--config:Path --set:str* {OUTPUT}"
WITHOUT_POOL = ("adapt-online", "docs", "export", "import-logs", "policies", "schema", "view")
GROUPS_WITHOUT_POOL = ("models", "router", "outcomes")
FLAGS = {
    "run": (
        "--policy:str --agent:str --checkpoint:Path --url:str --replay:Path --trace:Path --max-steps:int>=1 "
        "--deadline:float>=0.001"
    ),
    "chat": "--policy:str --agent:str --checkpoint:Path --url:str --max-steps:int>=1 --deadline:float>=0.001",
    "serve": (
        "--host:str --port:int>=1 --address:str$RAY_ADDRESS --checkpoint:Path --insecure:bool=False "
        "--policy:str* --app:str=dmoa --dry-run:bool=False --adapt:bool=False"
    ),
    "demo": "--port:int>=1 --out:Path=out/demo --questions:int>=1=1 --queries:int>=12=48 --held-out:int>=1=8 --seed:int>=0=0",
    "evaluate": (
        "--benchmarks:str=all --policies:str=dmoa,single --gates:str --data-dir:Path --split:str=test "
        "--limit:int>=1 --seed:int>=0=0 --difficulty:int>=1=1 --budget:str=pool --max-tokens:int>=1 --out:Path "
        "--adversaries:int>=0=0 --kind:str=liar --defence:str "
        "--resume:bool=False --retry-failed:bool=False --skip-bad-rows:bool=False "
        "--allow-weak-sandbox:bool=False --call-cache:Path --checkpoint:Path --url:str "
        "--address:str$RAY_ADDRESS --workers:int>=1=1 --concurrency:int>=1 --track:str=auto "
        "--selfcheck:bool=False --ablations:bool=False --rollouts:Path --explain:str --reply:str"
    ),
    "compare": (
        "--benchmarks:str! --policies:str=dmoa --gates:str --data-dir:Path --split:str=test "
        "--limit:int>=1 --seed:int>=0=0 --difficulty:int>=1=1 --budget:str=pool --max-tokens:int>=1 --out:Path "
        "--adversaries:int>=0=0 --kind:str=liar --defence:str "
        "--resume:bool=False --retry-failed:bool=False --skip-bad-rows:bool=False "
        "--allow-weak-sandbox:bool=False --call-cache:Path --checkpoint:Path --url:str "
        "--address:str$RAY_ADDRESS --workers:int>=1=1 --concurrency:int>=1 --track:str=auto "
        "--match:str=tokens --match-budget:float --baselines/--no-baselines:bool=True --repeats:int>=1=1 "
        "--curve:str= --curve-defences:str=none --share-calls/--no-share-calls:bool=True"
    ),
    "report": "--html:Path",
    "probe": (
        "--queries:str --benchmarks:str --rollouts:Path --outcomes:Path --known-answers:str --limit:int>=4=30 "
        "--known-limit:int>=4=60 --data-dir:Path --difficulty:int>=1=1 --seed:int>=0=0 --out:Path "
        "--call-cache:Path --address:str$RAY_ADDRESS"
    ),
    "export": "--format:str! --out:Path! --traces:Path --run:Path --margin:float=0.2",
    "import-logs": "--logs:Path*! --out:Path! --pool:Path --agent:str --columns:str=",
    "rollouts": (
        "--out:Path! --benchmarks:str= --queries:str* --data-dir:Path --split:str=train --difficulty:int>=1=1 "
        "--limit:int>=1 --seed:int>=0=0 --dense:bool=False --epsilon:float --round:int>=0=0 --checkpoint:Path "
        "--labels:Path --max-steps:int>=1 --max-tokens:int>=1 --skip-bad-rows:bool=False --call-cache:Path "
        "--address:str$RAY_ADDRESS --workers:int>=1=1 --concurrency:int>=1 --track:str=auto "
        "--field:str --from-traffic:str --app:str=dmoa --url:str --share:float=0.25"
    ),
    "train": (
        "--rollouts:Path*! --out:Path! --outcomes:Path --preset:str=few-shot --epochs:int>=1 --batch-queries:int>=1 "
        "--lr:float --patience:int>=1 --workers:str=auto --gpu:bool=False --loss:str=soft --score:str "
        "--head:str --core:str --start-from:Path --anchor-rollouts:Path "
        "--discount-constant/--keep-constant:bool=True --holdout:float=0.25 --alpha:str=auto "
        "--theta-alpha:float --agent-price:float>=0 --seed:int>=0=0 --dtype:str=float32 "
        "--max-bad-steps:int>=0=10 --max-failures:int>=0=3 --storage-path:str --address:str$RAY_ADDRESS "
        "--track:str=auto"
    ),
    "adapt": (
        "--benchmark:str! --queries:int>=1=30 --every:int>=1=1 --zero-shot:bool=False --replay:Path* --outcomes:Path "
        "--out:Path! --data-dir:Path --limit:int>=1 --difficulty:int>=1=1 --workers:int>=0=1 --allow-weak-sandbox:bool=False "
        "--address:str$RAY_ADDRESS --track:str=auto --lr:float=0.001 --steps:int>=1=4 --replay-ratio:float>=0=3.0 "
        "--pull:float>=0=0.01 --seed:int>=0=0 --checkpoint:Path"
    ),
    "adapt-online": (
        "--app:str=dmoa --address:str$RAY_ADDRESS --replay:Path* --out:Path=out/adapt-online --workers:int>=1=1 "
        "--every:int>=1=8 --offer-every:int>=1=4 --cpu-share:float=0.5 --poll-s:float=2.0 --track:str=auto --lr:float=0.001 "
        "--steps:int>=1=4 --replay-ratio:float>=0=3.0 --pull:float>=0=0.01 --seed:int>=0=0"
    ),
    "view": "--port:int>=0=8001",
    "policies": "",
    "docs": "",
    "schema": "--table:bool=False --example:bool=False",
    "doctor": "",
    "bench": "--only:str --rounds:int>=1 --engine:str --list:bool=False",
    "models list": "",
    "models fetch": "--verify:bool=False",
    "models path": "",
    "router install": "--note:str= --address:str$RAY_ADDRESS --app:str=dmoa",
    "router rollback": "--note:str= --address:str$RAY_ADDRESS --app:str=dmoa",
    "router history": "--address:str$RAY_ADDRESS --app:str=dmoa",
    "router freeze": "--note:str= --address:str$RAY_ADDRESS --app:str=dmoa",
    "router thaw": "--note:str= --address:str$RAY_ADDRESS --app:str=dmoa",
    "router status": "--address:str$RAY_ADDRESS --app:str=dmoa",
    "outcomes list": "--state:str --address:str$RAY_ADDRESS --app:str=dmoa",
    "outcomes export": "--out:Path=outcomes.jsonl --state:str --address:str$RAY_ADDRESS --app:str=dmoa",
}
"""Command -> its flags beside the common ones: NAME/OTHER:TYPE>=LEAST, then * for repeatable, ! for required, =DEFAULT."""


def commands(group: Any, name: str = "") -> dict[str, Any]:
    """Every command by its full name."""
    if not hasattr(group, "commands"):
        return {name: group}
    return {full: one for word, sub in group.commands.items() for full, one in commands(sub, f"{name} {word}".strip()).items()}


def spelt(option: Any) -> str:
    """One flag as the table has it."""
    kind = option.type_descriptor.annotation
    kind = kind.__args__[0] if hasattr(kind, "__args__") else kind
    text = f"{'/'.join((*option.opts, *option.secondary_opts))}:{kind.__name__}"
    text += "" if option.min is None else f">={option.min:g}"
    text += "*" * option.multiple + "!" * option.required + f"${option.envvar}" * (option.envvar is not None)
    return text + ("" if option.default is None else f"={option.default}")


FOUND = commands(typer.main.get_command(app))


def test_no_command_is_missing() -> None:
    assert FOUND.keys() == FLAGS.keys()


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_of_a_command_stay(name: str) -> None:
    flags = [spelt(option) for option in FOUND[name].params if option.param_type_name == "option"]
    has_pool = name not in WITHOUT_POOL and name.partition(" ")[0] not in GROUPS_WITHOUT_POOL
    assert sorted(flags) == sorted(f"{FLAGS[name]} {COMMON if has_pool else OUTPUT}".split())


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_explained(name: str) -> None:
    assert not [option.opts for option in FOUND[name].params if option.param_type_name == "option" and not option.help]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", "--epochs N Maximum epochs [10; preset full: 60]. [x>=1]"),
        ("train", "--loss soft|hard|hinge|listnet Ranking loss. [default: soft]"),
        ("train", "--anchor-rollouts DIR Folder with dense rollouts that the anchor set is taken from [--rollouts]."),
        ("evaluate", "--resume Go on with the run in --out."),
        ("probe", "--benchmarks A,B Benchmarks and suites [arith,words,calendar,parcels,signals,dyes]."),
        ("rollouts", "--data-dir DIR Benchmark files, one folder a benchmark [the Hugging Face hub]."),
    ],
)
def test_help_names_flags_choices_and_what_is_done_without(dmoa: Any, command: str, words: str) -> None:
    assert words in " ".join(dmoa(command, "--help").stdout.split())
