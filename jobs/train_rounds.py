"""Train the gate in on-policy rounds as a Ray job: collect with the current gate, train, collect again.

RAY_AUTH_MODE=token ray job submit --address URL --working-dir . -- python jobs/train_rounds.py --config jobs/train_rounds.yaml
"""

from __future__ import annotations

from dmoa.cli.jobs import train_rounds_job

if __name__ == "__main__":
    train_rounds_job()
