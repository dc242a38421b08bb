"""Collectives of a compiled program: kind, count and bytes, from its optimised HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

from dapt_jax.aot.hlo import Computation, Instruction, Program, results_of

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: One of `KINDS`.
        bytes: Bytes of one device's part in one run: the reduced or the gathered array; the larger of operand
            and result.
        group: Number of devices that take part together.
        count: Number of executions per run of the program.
    """

    kind: str
    bytes: int
    group: int
    count: int = 1

    @property
    def sent(self) -> float:
        """Return a lower bound on the bytes that each device sends for it, summed over all executions.

        For algorithms that are optimal for large arrays, such as a ring: 2 (n - 1) / n of the bytes that n
        devices all-reduce, half of that for a gather or a scatter (Patarasuk & Yuan, "Bandwidth optimal
        all-reduce algorithms for clusters of workstations", JPDC 69, 2009), and once the bytes that are
        permuted or broadcast.
        """
        share = (self.group - 1) / self.group
        per_byte = {"all-reduce": 2 * share, "collective-permute": 1, "collective-broadcast": 1}.get(
            self.kind, share
        )
        return self.bytes * per_byte * self.count


@dataclasses.dataclass(frozen=True)
class Total:
    """Collectives of one kind: number per run, and total bytes."""

    kind: str
    count: int
    bytes: int


def of_program(program: Program) -> list[Collective]:
    """Return every collective that a run of a program executes.

    Of an asynchronous collective, the start counts and the end does not; a collective that the compiler
    splits over several fusions appears in each of them under the same channel, and counts once. An
    all-reduce of which every device keeps only a slice, in one fusion, is a reduce-scatter.
    """
    found: list[Collective] = []
    channels: set[str] = set()
    for outer, computation, times in program.run():
        if outer.opcode.endswith(("-done", "-update")):
            continue
        for each, where, is_inside in _with_inside(program, outer, computation):
            kind = each.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"\bchannel_id=(\d+)", each.attributes)
            if is_inside and channel:
                if channel[1] in channels:
                    continue
                channels.add(channel[1])
            if kind == "all-reduce" and _is_sliced(each, where):
                kind = "reduce-scatter"
            found.append(
                Collective(kind, _payload(each, where), _group(each.attributes, program.devices), times)
            )
    return found


def totals(found: Iterable[Collective]) -> list[Total]:
    """Return the totals by kind, in the order of `KINDS`."""
    collectives = list(found)
    made = []
    for kind in KINDS:
        of_kind = [each for each in collectives if each.kind == kind]
        if of_kind:
            made.append(
                Total(
                    kind,
                    sum(each.count for each in of_kind),
                    sum(each.bytes * each.count for each in of_kind),
                )
            )
    return made


def _with_inside(
    program: Program, outer: Instruction, computation: Computation
) -> Iterator[tuple[Instruction, Computation, bool]]:
    yield outer, computation, False
    for inner, where in program.inside(outer):
        yield inner, where, True


def _is_sliced(each: Instruction, computation: Computation) -> bool:
    """Return whether the only use of a result is a slice that differs by device."""
    users = [other for other in computation.values() if each.name in other.operands]
    slices = [other for other in users if other.opcode == "dynamic-slice" and other.operands[0] == each.name]
    return bool(slices) and len(slices) == len(users)


def _payload(each: Instruction, computation: Computation) -> int:
    """Return the bytes of operands or of results, whichever are more.

    What an asynchronous start returns besides them does not count.
    """
    operands = [array for name in each.operands for array in results_of(computation, name)]
    given, results = sum(array.nbytes for array in operands), each.results
    if each.opcode.endswith("-start") and each.opcode != "all-reduce-start":
        # (operands, results, and for some kinds contexts): the operands are followed by as many results as
        # there are operands.
        results = results[len(operands) : 2 * len(operands)] or results
    return max(given, sum(array.nbytes for array in results))


def _group(attributes: str, devices: int) -> int:
    """Return the number of devices in a group; all devices where no groups are named."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    return devices
