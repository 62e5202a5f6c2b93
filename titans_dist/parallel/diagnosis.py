"""Which hosts are bad, out of what all processes of a preflight have found.

A host is bad where it is wrong in itself, or differs from most others that should be like it. What is the same on all
of several hosts, or cannot be laid to one of them, is a problem of the job: to leave hosts out would not help.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from titans_dist.parallel.machine import Findings
from titans_dist.parallel.preflight import TOGETHER

SLOW = 1.5
"""How many times the median a matrix product may take: equal GPUs differ by a few percent, and a throttled one takes
twice as long. A synchronous step waits for the slowest."""
SLOW_CPU = 3.0
"""The same for the best process on a host's CPUs: other work on a few cores makes it half as fast without being a
fault."""
SLOW_LINK = 3.0
"""How many times slower than the median of the hosts a host may send and receive: with three hops more it is still
below two; a port that fell back to a slower rate, or another network, is far above."""
CLOCK_S = 1.0
"""How far a clock may be from the median of all: leases and logs compare times of different machines."""


@dataclasses.dataclass
class Diagnosis:
    """What is wrong."""

    bad: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Host -> why it should be left out."""
    common: list[str] = dataclasses.field(default_factory=list)
    """What is wrong with no host in particular."""

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad and not self.common

    def blame(self, host: str, why: str) -> None:
        """Note it, once."""
        reasons = self.bad.setdefault(host, [])
        if why not in reasons:
            reasons.append(why)

    def sentence(self) -> str:
        """All of it in one line."""
        hosts = [f"{host} ({'; '.join(reasons)})" for host, reasons in self.bad.items()]
        bad = [f"{len(hosts)} bad host{'s' * (len(hosts) > 1)}: {', '.join(hosts)}"] if hosts else []
        return "; ".join([*bad, *self.common]) or "all is well"


def judge(found: Sequence[Findings]) -> Diagnosis:
    """The diagnosis of a preflight that came to its end."""
    result = Diagnosis()
    hosts = hosts_of(found)
    for reason in dict.fromkeys(problem for one in found for problem in one.problems):
        with_it = dict.fromkeys(one.host for one in found if reason in one.problems)
        if len(with_it) == len(hosts) > 1:
            result.common.append(f"on all hosts: {reason}")
        else:
            for host in with_it:
                result.blame(host, reason)
    for name in dict.fromkeys(name for one in found for name in one.versions):
        _differing(result, found, [one.versions.get(name, "none") for one in found], f"{name} {{}}, most others {{}}")
    kinds = dict.fromkeys((one.device, name) for one in found for name in one.products)
    for device, name in kinds:
        equal = [one for one in found if one.device == device and name in one.products]
        digests = [one.products[name].digest for one in equal]
        _differing(result, equal, digests, f"other bits of the same {name} product than equal devices")
        _slow(result, equal, name)
    clock = statistics.median(one.clock_s for one in found)
    for one in found:
        if abs(one.clock_s - clock) > CLOCK_S:
            result.blame(one.host, f"its clock is {one.clock_s - clock:+.1f} s off")
    _links(result, found)
    result.bad = {host: result.bad[host] for host in hosts if host in result.bad}
    return result


def judge_stuck(found: Sequence[Findings | None], ranks_of_host: int, *, is_stopped: bool = False) -> Diagnosis:
    """The diagnosis of one that did not: None stands for a process that has never written.

    `is_stopped` says that somebody has asked for the end: then nobody is behind.
    """
    result = Diagnosis()
    there = [one for one in found if one is not None]
    for rank in (rank for rank, one in enumerate(found) if one is None):
        # It has told nobody the name of its host; a process beside it may have.
        beside = {other.host for other in there if other.rank // ranks_of_host == rank // ranks_of_host}
        if len(beside) == 1:
            result.blame(beside.pop(), f"rank {rank} did not begin")
        else:
            result.common.append(f"rank {rank} did not begin")
    for one in there:
        if not one.ended:
            result.blame(one.host, f"rank {one.rank} is gone or hangs in {one.stage}")
    if 1 < len(hosts_of(there)) < 2 * len(result.bad):  # a network or a file system then, hardly so many hosts
        result.common += [f"{host}: {'; '.join(reasons)}" for host, reasons in result.bad.items()]
        result.bad = {}
    ended = [one for one in there if one.ended]
    if result.is_good and not is_stopped:
        reached = {one.rank: TOGETHER.index(one.stage) if one.stage in TOGETHER else -1 for one in ended}
        if len(set(reached.values())) > 1:
            for one in ended:
                if reached[one.rank] == min(reached.values()):
                    result.blame(one.host, f"rank {one.rank} did not get past {one.stage}")
        else:
            result.common.append(f"no process got past {ended[0].stage}")
    for one in there:
        for reason in one.problems:
            result.blame(one.host, reason)
    return result


def hosts_of(found: Iterable[Findings]) -> list[str]:
    """In order of rank."""
    return list(dict.fromkeys(one.host for one in found))


def _differing(result: Diagnosis, found: Sequence[Findings], values: Sequence[str], text: str) -> None:
    """Blame the hosts whose value is not the usual one; without a usual one, nobody in particular."""
    counts = Counter(values).most_common()
    if len(counts) < 2:
        return
    usual = counts[0][0]
    others = {one.host: value for one, value in zip(found, values, strict=True) if value != usual}
    if counts[0][1] == counts[1][1] and len(hosts_of(found)) > 1:
        name = text.split(" {}")[0]
        places = ", ".join(
            f"rank {found[values.index(value)].rank} on {found[values.index(value)].host}" for value, _ in counts
        )
        result.common.append(f"{name}: not the same everywhere, and no value is the usual one ({places})")
        return
    for host, value in others.items():
        result.blame(host, text.format(value, usual))


def _slow(result: Diagnosis, equal: Sequence[Findings], name: str) -> None:
    """Compare GPUs with GPUs, but CPUs host by host: processes of one host share its cores, and the best one tells."""
    times: dict[str, list[float]] = {}
    for one in equal:
        times.setdefault(one.host, []).append(one.products[name].seconds)
    limit = SLOW
    if any(one.device.startswith("cpu ") for one in equal):
        limit = SLOW_CPU
        times = {host: [min(seconds)] for host, seconds in times.items()}
    median = statistics.median_low(second for seconds in times.values() for second in seconds)
    for host, seconds in times.items():
        if max(seconds) > limit * median:
            result.blame(host, f"its {name} product takes {max(seconds) / median:.1f} times as long as others'")


def _links(result: Diagnosis, found: Sequence[Findings]) -> None:
    """Each link joins two processes: a host is slow where all of its links to others are, and wrong where two are."""
    links = [(found[one.rank - 1], one) for one in found if one.link_bytes_per_s is not None]
    wrong = [(a.host, b.host) for a, b in links if b.wrong_link]
    ends = Counter(host for pair in wrong for host in set(pair))
    for pair in wrong:
        most = max(ends[host] for host in pair)
        for host in dict.fromkeys(pair):
            if ends[host] == most:
                result.blame(host, f"what {pair[0]} sent to {pair[1]} did not come as it was sent")
    if not wrong and any(one.wrong_sum for one in found):
        result.common.append("the sum over all processes is wrong")
    speeds: dict[str, float] = {}
    for a, b in links:
        if a.host != b.host and b.link_bytes_per_s is not None:
            for host in (a.host, b.host):
                speeds[host] = max(speeds.get(host, 0.0), b.link_bytes_per_s)
    if len(speeds) > 2:  # of two, both share the one link that there is
        median = statistics.median(speeds.values())
        for host, speed in speeds.items():
            if speed * SLOW_LINK < median:
                result.blame(host, f"its network is {median / speed:.1f} times slower than others'")
