"""`serve run serve_app:app`: the pool that DMOA_CONFIG names, or the default pool, as a Serve application.

Serve reads its own flags in every process of the cluster, so those for short hops (`dmoa.serving.launch.SERVE_FLAGS`)
belong into the environment before `ray start`; `dmoa serve` sets them by itself.
Without API keys (DMOA_API_KEYS; DMOA_ADMIN_KEYS beside them) it is refused on a Serve that other machines can reach.
"""

import os

from dmoa.agents.pool import load_pool
from dmoa.serving.deploy import build_with_keys

app = build_with_keys(load_pool(os.environ.get("DMOA_CONFIG")))
