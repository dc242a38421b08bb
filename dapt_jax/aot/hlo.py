"""Parser of a compiled program's text: which instructions run, how often, and their memory traffic.

`jax.stages.Compiled.cost_analysis` counts the body of a loop once, however often it runs, and bytes of
operands wherever they are; a TPU's compiler keeps many of them in on-chip memory (memory spaces
other than 0 in the text).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*)?\{$")
_NAMED = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = ")
_ARRAY = re.compile(r"(?P<type>[a-z]+\d*\w*)\[(?P<sizes>[\d,<= ]*)\](?:\{(?P<layout>[^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_REFERENCE = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BITS = re.compile(r"\d+")

_NOT_RUN = frozenset({
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota", "opt-barrier",
    "parameter", "partition-id", "replica-id", "tuple", "while",
})  # fmt: skip
"""Instructions that cause no memory traffic themselves."""

_PARTS_ALONE = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a program.

    `bits` is the size of an element, and memory space 0 is the device's main memory.
    """

    type: str
    elements: int
    space: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without padding of the layout."""
        bits = 8 if self.type == "pred" else int((_BITS.search(self.type) or ["0"])[0])
        return -(-self.elements * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Name in its program.
        opcode: Opcode as HLO spells it.
        results: Arrays that it produces, those of a tuple in order.
        operands: Names of its operands.
        attributes: Rest of its line.
        arguments: Text between its brackets, verbatim.
        is_root: Whether its computation returns it.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    arguments: str = ""
    is_root: bool = False

    def called(self, key: str) -> list[str]:
        """Return the names of the computations under an attribute, such as `body` or `calls`."""
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|(%?[\w.-]+))", self.attributes)
        return [each.strip().lstrip("%") for each in (found[1] or found[2]).split(",")] if found else []

    @property
    def index(self) -> int:
        """Index of the tuple element that it extracts."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if found else -1


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, as one of its devices runs it.

    Attributes:
        computations: Computations by name, each with its instructions by name, in order.
        entry: Name of the entry computation.
        devices: Number of devices that run the program together.
    """

    computations: Mapping[str, Computation]
    entry: str
    devices: int

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Parse the text that `jax.stages.Compiled.as_text` returns."""
        counts = [
            int(found)
            for found in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
        ]
        computations: dict[str, dict[str, Instruction]] = {}
        entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if named := _NAMED.match(line):
                current[named["name"]] = _instruction(named["name"], line[named.end() :], bool(named["root"]))
            elif header := _HEADER.match(line):
                current = computations.setdefault(header["name"], {})
                entry = header["name"] if header["entry"] else entry
        return cls(computations, entry, math.prod(counts))

    def run(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yield every instruction that runs, its computation, and how often; not those inside fusions.

        The body of a loop whose trip count is unknown counts once, and so does every branch.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for each in computation.values():
            yield each, computation, times
            if each.opcode == "while":
                trips = self.trips(each, computation)
                inside = times * (1 if trips is None else trips)
                for part in (*each.called("body"), *each.called("condition")):
                    yield from self._walk(part, inside)
            elif each.opcode in ("call", "conditional"):
                for key in ("to_apply", "branch_computations", "true_computation", "false_computation"):
                    for part in each.called(key):
                        yield from self._walk(part, times)

    def inside(self, each: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """Yield the instructions of a fusion or an asynchronous computation, at all depths."""
        for part in each.called("calls"):
            computation = self.computations[part]
            for inner in computation.values():
                yield inner, computation
                yield from self.inside(inner)

    @property
    def unknown_loops(self) -> int:
        """Number of loops that run with an unknown trip count."""
        return sum(
            each.opcode == "while" and self.trips(each, where) is None for each, where, _ in self.run()
        )

    def trips(self, loop: Instruction, computation: Computation) -> int | None:
        """Return how often a loop's body runs; None where that is unknown.

        XLA:CPU states it. In the output of a TPU's compiler, a counter is recognised: it starts from a
        constant, a constant is added to it, and it is compared with a constant.
        """
        if said := _TRIPS.search(loop.attributes):
            return int(said[1])
        condition = self.computations[loop.called("condition")[0]]
        compared = _root(condition)
        if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
            return None
        counter, limit = (condition.get(name) for name in compared.operands)
        if counter is None or limit is None or counter.opcode != "get-tuple-element":
            return None
        body = self.computations[loop.called("body")[0]]
        start = _constant(computation, computation[loop.operands[0]].operands[counter.index])
        stop, step = _constant(condition, limit.name), _added(body, counter.index)
        if start is None or stop is None or step is None:
            return None
        return max(0, -(-(stop - start) // step))

    @functools.cached_property
    def memory_bytes(self) -> int:
        """Return the bytes that one run reads from and writes to the device's memory.

        They are those of the arrays that its instructions name.
        """
        return sum(self._moved(each, computation) * times for each, computation, times in self.run())

    def _moved(self, each: Instruction, computation: Computation) -> int:
        """Return the bytes that one instruction moves through the device's memory."""
        if each.opcode in _NOT_RUN or each.opcode.endswith(("-start", "-update")):
            return 0
        if each.opcode.endswith("-done"):
            # The end of an asynchronous copy accounts for its traffic: out of the memory, into it, or both.
            begun = computation[each.operands[0]]
            sources = [array for name in begun.operands for array in results_of(computation, name)]
            ends = sum(array.space == 0 for array in sources[:1])
            return sum(array.nbytes * ((array.space == 0) + ends) for array in each.results)
        written = sum(array.nbytes for array in each.results if array.space == 0)
        if each.opcode in _PARTS_ALONE:
            return 2 * written
        if each.opcode == "dynamic-update-slice":
            return 2 * sum(array.nbytes for array in results_of(computation, each.operands[1]))
        read = 0
        for place, name in enumerate(each.operands):
            arrays = results_of(computation, name)
            whole = sum(array.nbytes for array in arrays if array.space == 0)
            read += min(whole, self._read_of(each, place, whole)) if each.opcode == "fusion" else whole
        return written + read

    def _read_of(self, fusion: Instruction, place: int, whole: int) -> int:
        """Return the bytes that a fusion reads of an operand: all, or only the slices that it uses."""
        for part in fusion.called("calls"):
            computation = self.computations[part]
            names = [
                each.name
                for each in computation.values()
                if each.opcode == "parameter" and each.arguments == str(place)
            ]
            users = [
                each for each in computation.values() if each.operands and set(names) & set(each.operands)
            ]
            if users and all(each.opcode in _PARTS_ALONE and each.operands[0] in names for each in users):
                return sum(array.nbytes for each in users for array in each.results)
        return whole


def _root(computation: Computation) -> Instruction:
    return next(each for each in computation.values() if each.is_root)


def _constant(computation: Computation, name: str) -> int | None:
    """Return the value of an instruction that is an integer constant."""
    each = computation.get(name)
    while each is not None and each.opcode in ("copy", "bitcast", "convert"):
        each = computation.get(each.operands[0])
    is_whole = each is not None and each.opcode == "constant" and re.fullmatch(r"-?\d+", each.arguments)
    return int(each.arguments) if each is not None and is_whole else None


def _added(body: Computation, index: int) -> int | None:
    """Return the positive constant that a loop's body adds to an element of its carry."""
    carried = _root(body)
    each = body.get(carried.operands[index]) if carried.opcode == "tuple" else None
    if each is None or each.opcode != "add":
        return None
    before = [body[name] for name in each.operands if name in body and body[name].index == index]
    steps = [step for name in each.operands if (step := _constant(body, name)) is not None]
    return steps[0] if before and steps and steps[0] > 0 else None


def results_of(computation: Computation, name: str) -> tuple[Array, ...]:
    """Return the arrays that an instruction produces; none if the instruction does not exist."""
    return computation[name].results if name in computation else ()


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """Parse an instruction line, starting at its shape."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    arrays = tuple(_array(found) for found in _ARRAY.finditer(shape))
    operands = tuple(_REFERENCE.findall(arguments))
    return Instruction(
        name, rest[:opening].strip(), arrays, operands, rest[closing + 1 :], arguments, is_root
    )


def _array(found: re.Match[str]) -> Array:
    sizes = [int(size) for size in re.findall(r"\d+", found["sizes"])]
    space = _SPACE.search(found["layout"] or "")
    return Array(found["type"], math.prod(sizes), int(space[1]) if space else 0)


def _closing(text: str, opening: int) -> int:
    """Return the position of the bracket that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no closing bracket in {text[:80]!r}")
