"""AIBrix's `slo` family, as AIBrix's own default installation answers it."""

from typing import ClassVar

from router.strategies.least_request import LeastRequest


class Slo(LeastRequest):
    """score = requests in flight. [requests]

    AIBrix orders waiting requests by how close they are to a deployment's latency objective, if Redis holds a profile
    of it; without profiles, which is the default, its queue is first in, first out with `least-request`, and that is
    what its responses say. Here nothing waits in the router, so there is no order to choose.
    """

    name: ClassVar[str] = "slo"
    told_as: ClassVar[str] = LeastRequest.name


class SloPackLoad(Slo):
    """As `slo`."""

    name: ClassVar[str] = "slo-pack-load"


class SloLeastLoad(Slo):
    """As `slo`."""

    name: ClassVar[str] = "slo-least-load"


class SloLeastLoadPulling(Slo):
    """As `slo`."""

    name: ClassVar[str] = "slo-least-load-pulling"
