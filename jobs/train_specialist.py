"""Train one LoRA specialist as a Ray job: a recipe of the `job:` section, from generated rows to an adapter with its card.

RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- \
    python jobs/train_specialist.py --config jobs/train_specialist.yaml --set job.name=words --set job.workers=2
"""

from __future__ import annotations

from dmoa.cli.jobs import train_specialist_job

if __name__ == "__main__":
    train_specialist_job()
