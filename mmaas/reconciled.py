"""What replicas were busy for beside what is on the bills: the running gateway's counters and the ledger, by model.

Both are looked at since the model's oldest replica began to count. What others computed before it, or a replica that is gone since,
is on bills only; requests that still run are on none yet.
"""

from __future__ import annotations

import time
from collections import defaultdict

from cluster.settings import Settings
from cluster.store import Store
from cluster.tenancy.attribution import MICROSECONDS, Reconciliation

FIELDS = ("held_s", "busy_s", "attributed_s", "oldest_s")
"""Of the counters."""

MARGIN_S = 60.0
"""An organization's time may be so much ahead of this clock."""


def collect(settings: Settings, store: Store) -> dict[str, Reconciliation]:
    """By the name of each model that answers. Raises Unavailable without a gateway."""
    now = time.time()
    return {
        model: Reconciliation(
            counted["held_s"], counted["busy_s"], counted["attributed_s"], billed(store, model, now - counted["oldest_s"], now)
        )
        for model, counted in counters(settings).items()
        if len(counted) == len(FIELDS)
    }


def counters(settings: Settings) -> dict[str, dict[str, float]]:
    """What the gateway shows to an administrator, by model."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    from cluster import metrics
    from cluster.errors import Unavailable
    from mmaas.quickstart import Quickstart

    headers = {"Authorization": f"Bearer {Quickstart.load(settings).admin_key}"}
    try:
        answer = httpx.get(f"{settings.base_url}/metrics", headers=headers, timeout=10, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise Unavailable(f"the gateway doesn't show its metrics ({error}); run: mmaas up") from None
    wanted, found = {metrics.ENGINE[field][1]: field for field in FIELDS}, defaultdict[str, dict[str, float]](dict)
    for family in text_string_to_metric_families(answer.text):
        if field := wanted.get(family.name):
            for sample in family.samples:
                found[sample.labels["model"]][field] = sample.value
    return found


def billed(store: Store, model: str, start: float, end: float) -> float:
    """Compute seconds of a model's usage records, its adapters' too."""
    from cluster.tenancy.usage_report import Question, usage

    sums = usage(store, Question(start, end + MARGIN_S, by=("model",)))
    return sum(each.metered.compute_seconds for each in sums if str(each.group["model"]).partition(":")[0] == model) / MICROSECONDS
