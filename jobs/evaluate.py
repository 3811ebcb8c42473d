"""Evaluate policies on benchmarks as a Ray job: `dmoa evaluate` with its options in the `job:` section of a pool file.

RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- python jobs/evaluate.py --config jobs/evaluate.yaml
"""

from __future__ import annotations

from dmoa.cli.jobs import evaluate_job

if __name__ == "__main__":
    evaluate_job()
