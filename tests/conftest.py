"""Settings that must be made before torch is loaded."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow everything some thirty times on a busy machine
