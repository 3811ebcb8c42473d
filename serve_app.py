"""`serve run serve_app:app`: the pool that DMOA_CONFIG names, or the default pool, as a Serve application.

Serve reads its own flags in every process of the cluster, so those for short hops (`dmoa.serving.launch.SERVE_FLAGS`)
belong into the environment before `ray start`; `dmoa serve` sets them by itself.
"""

import os

from dmoa.agents.pool import load_pool
from dmoa.serving.app import build_app
from dmoa.serving.http.middleware import hash_keys

app = build_app(load_pool(os.environ.get("DMOA_CONFIG")), key_hashes=hash_keys(os.environ))
