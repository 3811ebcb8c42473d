"""Build the Serve config of a pool: `serve.yaml` for `serve deploy`, and the same text inside a RayService manifest.

python cluster/build.py                                                      # cluster/serve.yaml and the shipped RayService
python cluster/build.py --pool my.yaml --out serve.yaml --set router.state_uri=s3://bucket/dmoa
python cluster/build.py --pool my.yaml --out serve.yaml --manifest rayservice.yaml
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import yaml

from dmoa.errors import DmoaError
from dmoa.serving.deploy import serve_config
from dmoa.yaml_tree import parse_yaml, set_value

HERE = Path(__file__).parent
POOL = HERE / "pools" / "paper.yaml"
SERVE = HERE / "serve.yaml"
MANIFEST = HERE / "kuberay" / "service" / "rayservice.yaml"
_HEADER = "# Built by cluster/build.py from the pool {pool}: change the pool, then build again.\n"
# The block scalar ends where the next key of `spec` begins.
_EMBEDDED = re.compile(r"^  serveConfigV2: \|\n(?:    .*\n|\n)*", re.M)


class _Plain(yaml.SafeDumper):
    """Writes every value out: no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def render_serve(pool: Path, overrides: list[str]) -> str:
    """Return the text of the Serve config of a pool file. Raises ConfigError."""
    tree = parse_yaml(pool.read_text(encoding="utf-8"), str(pool))
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


def main() -> None:
    """Build and write; exits 2 for a bad pool or manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=POOL, help="pool file")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change a value of the pool"
    )
    parser.add_argument("--out", type=Path, default=SERVE, help="Serve config to write")
    parser.add_argument(
        "--manifest", type=Path, help="RayService manifest to write it into [the shipped one for the shipped pool]"
    )
    options = parser.parse_args()
    is_shipped = options.out == SERVE and options.pool == POOL
    manifest = options.manifest or (MANIFEST if is_shipped else None)
    try:
        serve = render_serve(options.pool, options.overrides)
        embedded = embed(manifest.read_text(encoding="utf-8"), serve) if manifest else None
    except (DmoaError, OSError, ValueError) as error:
        print(f"build: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    options.out.write_text(serve, encoding="utf-8")
    if manifest and embedded is not None:
        manifest.write_text(embedded, encoding="utf-8")


if __name__ == "__main__":
    main()
