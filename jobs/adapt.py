"""Adapt a gate as a Ray job: `dmoa adapt`, or with --online `dmoa adapt --online`, its options in the `job:` section of a file.

RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- python jobs/adapt.py --config jobs/adapt.yaml
RAY_AUTH_MODE=token ray job submit --address ADDRESS --working-dir . -- \
    python jobs/adapt.py --online --config jobs/adapt_online.yaml
"""

from __future__ import annotations

import sys

from dmoa.cli.jobs import adapt_job, adapt_online_job

if __name__ == "__main__":
    is_online = "--online" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--online"]
    (adapt_online_job if is_online else adapt_job)()
