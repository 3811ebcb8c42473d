"""`serve run serve_app:app`: the pool that DMOA_CONFIG names, or the default pool, as a Serve application."""

import os

from dmoa.serving.launch import set_flags

set_flags()

from dmoa.agents.pool import load_pool  # noqa: E402 -- Serve reads its flags when it is first imported
from dmoa.serving.app import build_app  # noqa: E402
from dmoa.serving.auth import hash_keys  # noqa: E402

app = build_app(load_pool(os.environ.get("DMOA_CONFIG")), key_hashes=hash_keys(os.environ))
