"""The front is light: a replica that only speaks HTTP loads neither ray nor torch, an ingress loads no torch."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("http.requests", "http.service", "http.middleware", "http.errors", "http.responses", "http.routes", "client")


def test_the_http_front_loads_neither_ray_nor_torch() -> None:
    imports = ", ".join(f"dmoa.serving.{name}" for name in MODULES)
    code = f"import sys, {imports}; print(sorted({{'ray', 'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_ingress_loads_no_torch() -> None:
    """Of the router it needs the class alone, to create it where torch is loaded."""
    code = "import sys, dmoa.serving.app; print(sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
