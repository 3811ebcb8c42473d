"""The page: static, under a strict policy, without data; its routes show a key its own, and an admin key all and more."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

import dmoa
from dmoa.errors import RequestError
from dmoa.serving.actors import pack_record
from dmoa.serving.app import Observatory
from dmoa.serving.http.middleware import ADMIN_VARIABLE, hash_keys
from dmoa.serving.trace_list import TraceFilter
from dmoa.types import RouterStatus
from tests.unit.serving.fake_service import AGENTS, FakeService, connect, make_app
from tests.unit.serving.test_traces import answered

PAGE = Path(dmoa.__file__).parent / "serving" / "page"
KEYS = hash_keys({"DMOA_API_KEYS": "one,two"})
ADMINS = hash_keys({ADMIN_VARIABLE: "root"}, ADMIN_VARIABLE)
ASSETS = sorted(path.name for path in PAGE.iterdir() if path.name != "index.html")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def service_with_traces() -> FakeService:
    """Three queries: two of key `one`, one of key `two`."""
    service = FakeService()
    for trace_id, owner in (("t1", KEYS[0]), ("t2", KEYS[1]), ("t3", KEYS[0])):
        await service.page.store.put_all([(pack_record(answered(trace_id)), owner)])
    return service


async def test_the_page_needs_no_key_and_holds_no_data() -> None:
    async with connect(make_app(FakeService(), keys=KEYS)) as client:
        response = await client.get("/")
        assert response.status_code == 200
        assert "tiny" not in response.text
        assert "@root@" not in response.text
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        for name in re.findall(r'(?:src|href)="(/page/[^"]+)"', response.text):
            found = await client.get(name)
            assert (found.status_code, found.headers["x-content-type-options"]) == (200, "nosniff"), name


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "..%2fapp.py", "%2e%2e/traces.py", "app.py"])
async def test_nothing_but_its_own_files_is_served(name: str) -> None:
    async with connect(make_app(FakeService())) as client:
        assert (await client.get(f"/page/{name}")).status_code == 404


@pytest.mark.parametrize("name", ASSETS)
def test_no_markup_is_parsed_and_nothing_is_fetched_from_elsewhere(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "localStorage"):
        assert word not in text
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}


async def test_a_key_sees_its_own_queries_and_an_admin_key_all() -> None:
    service = await service_with_traces()
    async with connect(make_app(service, keys=KEYS, admins=ADMINS)) as client:
        for key, query, ids in (
            ("one", "", ["t3", "t1"]),
            ("two", "", ["t2"]),
            ("two", "?mine=false", ["t2"]),
            ("root", "", ["t3", "t2", "t1"]),
            ("root", "?mine=true", []),
        ):
            found = (await client.get(f"/v1/dmoa/traces{query}", headers=bearer(key))).json()
            assert [one["trace_id"] for one in found["data"]] == ids, (key, query)
        refused = await client.get("/v1/dmoa/traces")
        assert refused.status_code == 401


async def test_a_bad_filter_is_a_400_that_names_it() -> None:
    async with connect(make_app(FakeService())) as client:
        response = await client.get("/v1/dmoa/traces?limit=0")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


async def test_status_tells_of_the_pool_and_of_the_queries_that_the_key_may_see() -> None:
    service = await service_with_traces()
    async with connect(make_app(service, keys=KEYS, admins=ADMINS)) as client:
        mine = (await client.get("/v1/dmoa/status", headers=bearer("two"))).json()
        everybody = (await client.get("/v1/dmoa/status", headers=bearer("root"))).json()
    assert (mine["pool"], mine["is_admin"], everybody["is_admin"]) == ("tiny", False, True)
    assert mine["agents"] == dict.fromkeys(AGENTS, "up")
    calls = [{one["agent"]: one["calls"] for one in found["statistics"]} for found in (mine, everybody)]
    assert [found["a"] for found in calls] == [1, 3]


@pytest.mark.parametrize(("key", "admins"), [("one", ADMINS), ("one", ()), ("root", ())])
async def test_only_an_admin_key_rolls_back(key: str, admins: tuple[str, ...]) -> None:
    service = FakeService()
    async with connect(make_app(service, keys=KEYS, admins=admins)) as client:
        refused = await client.post("/v1/dmoa/gates/rollback", json={}, headers=bearer(key))
    assert (refused.status_code, refused.json()["error"]["code"]) in ((403, "admin_only"), (401, "invalid_api_key"))
    assert len(service.page.history) == 3


async def test_an_admin_key_rolls_back_where_nobody_else_needs_a_key() -> None:
    service = FakeService()
    async with connect(make_app(service, admins=ADMINS)) as client:
        assert (await client.get("/v1/models", headers=bearer("any"))).status_code == 200
        assert (await client.post("/v1/dmoa/gates/rollback", json={}, headers=bearer("any"))).status_code == 403
        done = await client.post("/v1/dmoa/gates/rollback", json={"note": "worse"}, headers=bearer("root"))
        assert done.json() == {"version": "v2", "previous": "v3", "changed": True}
        found = (await client.get("/v1/dmoa/gates")).json()
        assert (found["current"], found["history"][-1]["note"]) == ("v2", "worse")
        unknown = await client.post("/v1/dmoa/gates/rollback", json={"version": "v9"}, headers=bearer("root"))
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "version")


async def test_gates_of_a_router_that_is_away_are_a_503() -> None:
    service = FakeService()
    service.page.is_away = True
    async with connect(make_app(service)) as client:
        assert (await client.get("/v1/dmoa/gates")).status_code == 503
        assert (await client.get("/v1/dmoa/status")).json()["router"] is None


class _Actor:
    """An actor's handle, whose methods answer from a table, or raise."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, SimpleNamespace(remote=partial(self._answer, answer)))

    async def _answer(self, answer: Any, *arguments: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_a_trace_store_that_is_away_has_not_lost_everything() -> None:
    pool: Any = SimpleNamespace(config=SimpleNamespace(agent_names=("a",)))
    away = ActorUnavailableError("it restarts", b"0" * 16)
    page = Observatory(traces=_Actor(listed=away), router=SimpleNamespace(), actor=None, swarm=pool)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="the trace store is away; try again in a moment") as caught:
        await page.traces(TraceFilter(), None)
    assert (caught.value.status, caught.value.code) == (503, "traces_away")


async def test_the_current_gate_is_the_routers_not_the_last_that_was_offered() -> None:
    history = [{"version": "v1", "action": "configured"}, {"version": "v2", "action": "refused"}]
    status = RouterStatus(app="dmoa", pool="p", pool_fingerprint="f", pool_version="v", gate_version="v1", agents=("a",))
    pool: Any = SimpleNamespace(config=SimpleNamespace(agent_names=("a",)))
    page = Observatory(traces=None, router=SimpleNamespace(), actor=_Actor(history=history, status=status), swarm=pool)  # type: ignore[arg-type]
    assert await page.gates() == {"current": "v1", "history": history}
