r"""Collect rollouts as a Ray job: `dmoa rollouts` with its options in the `job:` section of a pool file.

RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- \
    python jobs/collect_rollouts.py --config jobs/collect_rollouts.yaml
"""

from __future__ import annotations

from dmoa.cli.jobs import collect_rollouts_job

if __name__ == "__main__":
    collect_rollouts_job()
