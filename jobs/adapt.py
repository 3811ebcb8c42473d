"""Adapt a gate to a benchmark as a Ray job: `dmoa adapt` with its options in the `job:` section of a pool file.

RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- python jobs/adapt.py --config jobs/adapt.yaml
"""

from __future__ import annotations

from dmoa.cli.jobs import adapt_job

if __name__ == "__main__":
    adapt_job()
