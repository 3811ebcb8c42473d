"""Train the gate as a Ray job: `dmoa train` with its options in the `job:` section of a pool file.

RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- python jobs/train_gate.py --config jobs/train_gate.yaml
"""

from __future__ import annotations

from dmoa.cli.jobs import train_gate_job

if __name__ == "__main__":
    train_gate_job()
