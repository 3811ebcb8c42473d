"""Build the Serve config of a pool: `serve.yaml` for `serve deploy`, and the same text inside a RayService manifest.

python cluster/build.py                                                      # cluster/serve.yaml and the shipped RayService
python cluster/build.py --pool my.yaml --out serve.yaml --set router.state_uri=s3://bucket/dmoa
python cluster/build.py --pool my.yaml --out serve.yaml --manifest rayservice.yaml
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from dmoa.agents.pool import packaged_pools
from dmoa.errors import ConfigError, DmoaError
from dmoa.loopback import is_loopback
from dmoa.serving.deploy import serve_config
from dmoa.yaml_tree import parse_yaml, set_value

HERE = Path(__file__).parent
POOL = HERE / "pools" / "paper.yaml"
SERVE = HERE / "serve.yaml"
MANIFEST = HERE / "kuberay" / "service" / "rayservice.yaml"
_HEADER = "# Built by cluster/build.py from the pool {pool}: change the pool, then build again.\n"
# The block scalar ends where the next key of `spec` begins.
_EMBEDDED = re.compile(r"^  serveConfigV2: \|\n(?:    .*\n|\n)*", re.M)
_READ_OTHERWISE = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o[0-7]+|[yYnN]|.*[\x85\u2028\u2029].*", re.S)
"""Texts that KubeRay, whose YAML is another program's, would take for numbers, truth values or ends of lines."""


class _Plain(yaml.SafeDumper):
    """Writes every value out, no aliases, and in quotes what others read otherwise."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, value: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", value, style='"' if _READ_OTHERWISE.fullmatch(value) else None)


_Plain.add_representer(str, _Plain.text)


def render_serve(pool: Path, overrides: list[str]) -> str:
    """Return the text of the Serve config of a pool file, or of a packaged pool by its name. Raises ConfigError."""
    try:
        text = (pool if pool.exists() else packaged_pools().get(str(pool), pool)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--pool: cannot read {str(pool)!r}: {error}; give the path of a pool YAML file") from error
    tree = parse_yaml(text, str(pool))
    for override in overrides:
        set_value(tree, override)
    body = yaml.dump(serve_config(tree, source=str(pool)), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
    return _HEADER.format(pool=pool.name) + body


def embed(manifest: str, serve: str) -> str:
    """Return a RayService manifest with the Serve config in it, the rest unchanged. Raises ValueError without a place for it."""
    block = "  serveConfigV2: |\n" + "".join(f"    {line}\n" for line in serve.splitlines())
    replaced, times = _EMBEDDED.subn(lambda _: block, manifest)
    if times != 1:
        raise ValueError(f"the manifest has {times} blocks `serveConfigV2: |`; it must have one, two spaces deep under `spec`")
    return replaced


def check_reach(manifest: str, serve: str) -> None:
    """Raise ValueError where nobody reaches what the Serve config listens on in the pods of a RayService."""
    host, port = yaml.safe_load(serve)["http_options"].values()
    if is_loopback(host):
        raise ValueError(
            f"server.host is {host!r}, where a pod is reached by itself alone: the service would never be ready; set it to "
            "0.0.0.0 (--set server.host=0.0.0.0)"
        )
    try:
        opened = set(_serve_ports(list(yaml.safe_load_all(manifest))))
    except yaml.YAMLError:
        return  # a template of another program, whose ports are its own
    if opened - {port}:
        raise ValueError(
            f"server.port is {port}; the manifest's pods, its Service and the NetworkPolicy have {sorted(opened)[0]} for Serve; "
            "set that one (--set server.port=...), or change the port in all three"
        )


def _serve_ports(tree: object) -> Iterator[int]:
    """Yield the port of every container that KubeRay takes for Serve's, by its name."""
    if isinstance(tree, dict):
        if tree.get("name") == "serve" and isinstance(port := tree.get("containerPort"), int):  # in a template it may be a name
            yield port
        tree = list(tree.values())
    for part in tree if isinstance(tree, list) else ():
        yield from _serve_ports(part)


def main() -> None:
    """Build and write; exits 2 for a bad pool or manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=POOL, help="pool file, or the name of a packaged pool")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change a value of the pool"
    )
    parser.add_argument("--out", type=Path, default=SERVE, help="Serve config to write [cluster/serve.yaml]")
    parser.add_argument(
        "--manifest", type=Path, help="RayService manifest to write it into [the shipped one for the shipped pool]"
    )
    options = parser.parse_args()
    is_shipped = options.out == SERVE and options.pool == POOL
    manifest = options.manifest or (MANIFEST if is_shipped else None)
    try:
        serve = render_serve(options.pool, options.overrides)
        embedded = embed(manifest.read_text(encoding="utf-8"), serve) if manifest else None
        if embedded is not None:
            check_reach(embedded, serve)
        options.out.write_text(serve, encoding="utf-8")
        if manifest and embedded is not None:
            manifest.write_text(embedded, encoding="utf-8")
    except (DmoaError, OSError, ValueError) as error:
        print(f"build: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    more = f", and into {manifest}: `kubectl apply -k {manifest.parent}` is next" if manifest else ""
    print(f"build: wrote {options.out} (on a Ray of your own: `serve deploy {options.out}`){more}", file=sys.stderr)


if __name__ == "__main__":
    main()
