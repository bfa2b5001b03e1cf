"""Whose answer it is where Envoy may have retried: with `override-host` it gets several addresses in order, takes the
first, and for each retry the next.

The charge stays with the pod that was chosen first: a retry comes within milliseconds of a refused connection. What is
told to the client, and what counts for a pod's health, follows the pod that answered; those before it have failed.
"""

from collections.abc import Sequence

from router.fleet import Pod
from router.scheduler import Scheduler
from state.ledger import Charge


def answered_after_retries(
    scheduler: Scheduler, charge: Charge, tried: Sequence[str], address: str, *, count: bool = True
) -> Pod | None:
    """The pod at `address`, if it is another of those in `tried` than the first, to which `charge` belongs. The pods
    before it get a failure, unless somebody else will `count` it. None where nothing was retried, or who answered is
    not known."""
    if not tried or address == tried[0] or address not in tried:
        return None
    if not count:
        return scheduler.fleet.by_address(address)
    scheduler.outcome(charge, ok=False)
    for other in tried[1 : tried.index(address)]:
        failed = scheduler.fleet.by_address(other)
        if failed is not None:
            scheduler.outcome(Charge(failed.slot, failed.generation, 0), ok=False)
    pod = scheduler.fleet.by_address(address)
    scheduler.series.add(1.0, "retried", pod.name if pod is not None else "")
    return pod
