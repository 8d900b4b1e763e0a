"""What ``benchmarks.fleet`` is told to simulate, and what it tells."""

from typing import NamedTuple

from resilience import Quota


class Costs(NamedTuple):
    """Seconds that things take.

    Args:
        command: a node's CPU for a command, without what its groups take.
        group: its CPU for each group of equal calls in it.
        call: its CPU for each further call of a group.
        request: a process's CPU for a request, before it asks the store, and again after.
        network: from a process to a node, and back.
    """

    command: float
    group: float
    call: float
    request: float = 50e-6
    network: float = 100e-6


class Scene(NamedTuple):
    """What is simulated.

    Args:
        processes: how many share the load by chance.
        rate: requests a second of all together.
        callers: how many there are.
        skew: exponent of Zipf's law: the n-th caller sends n**-skew of what the first one sends.
        quota: of each caller.
        seconds: that are simulated, of which the first ``warm`` are not counted.
        merge: whether the calls of one turn share a request.
        deny: whether denials are remembered.
        nodes: of Redis.
    """

    processes: int
    rate: float
    callers: int
    skew: float
    quota: Quota
    seconds: float
    warm: float
    merge: bool = True
    deny: bool = True
    nodes: int = 1


class Told(NamedTuple):
    """What came of it, a second of simulated time.

    Args:
        requests: that came.
        denied: of these, by the store or from memory.
        commands: that were sent to the nodes.
        busiest: share of its time that the busiest node worked, 0 to 1.
        wait: seconds that 99 of 100 calls to the store took at most, from the turn's end on.
    """

    requests: float
    denied: float
    commands: float
    busiest: float
    wait: float
