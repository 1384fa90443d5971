"""Runs a kernel's PTX on the CPU: what the compiler made of a CuTe kernel, without a GPU.

Every warp executes its threads in lockstep, those that are furthest behind first; warps run in random order from
barrier to barrier. It knows the instructions that the selection compiles to, on integers and a few on float32, with
shared memory, its remote reads in a cluster, and barriers. An instruction for a whole warp or CTA asserts that all of
its threads are there; addresses outside what a kernel owns are errors.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

Lanes = np.ndarray[Any, Any]
"""A value of each of a warp's 32 threads."""
LANES = 32
SIGNED = {"s32": np.int32, "s64": np.int64}
SEGMENT_BITS, RANK_BITS = 40, 24
"""A global address is a tensor's number above its bytes; a remote one of shared memory a CTA's rank above its."""
UNSET = 0xDEADBEEF
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
COMPARE |= {"ge": np.greater_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not}
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
FLOATS = ARITHMETIC | {"div": np.divide}


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: the predicate that it needs; negated: that it needs false. parts: of its name."""

    guard: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.parts[-1]


@dataclass(frozen=True)
class Program:
    """A kernel's instructions, the places of its labels, its parameters' names, and its shared memory in bytes."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    parameters: tuple[str, ...]
    shared_bytes: int
    num_threads: int

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads the PTX of one kernel."""
        head, body = text[: text.index(".reqntid")], text[text.index("{", text.index(".visible .entry")) + 1 :]
        body = re.sub(r"//[^\n]*", "", body[: body.rindex("}")])
        labels: dict[str, int] = {}
        instructions: list[Instruction] = []
        scopes: list[dict[str, str]] = []
        pieces = re.findall(r"\$L\w+:|[^;{}\s:][^;{}]*\{[^{};]*\}[^;{}]*;|[^;{}\s][^;{}]*;|\{|\}", body)
        for number, piece in enumerate(pieces):
            words = piece.rstrip(";").strip()
            while label := re.match(r"(\$L\w+):\s*", words):
                labels[label[1]] = len(instructions)
                words = words[label.end() :]
            if words == "{":
                scopes.append({})
            elif words == "}":
                scopes.pop()
            elif words.startswith(".reg") and scopes:
                names = [name.strip() for name in words.split(None, 2)[2].split(",")]
                scopes[-1] |= {name: f"%{name}_{number}" for name in names}
            elif words and not words.startswith("."):
                instructions.append(_instruction(words, scopes))
        shared = re.search(r"__static_shmem__0\[(\d+)\]", text)
        threads = re.search(r"\.reqntid (\d+)", text)
        assert shared
        assert threads
        names = tuple(re.findall(r"(\w+_param_\d+)\b", head))
        return cls(tuple(instructions), labels, names, int(shared[1]), int(threads[1]))


def _instruction(words: str, scopes: Sequence[Mapping[str, str]]) -> Instruction:
    for scope in scopes:
        for name, unique in scope.items():
            words = re.sub(rf"(?<![\w.%$:]){name}(?![\w.:])", unique, words)
    found = re.match(r"(@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", words, re.DOTALL)
    assert found, words
    operands = tuple(part.strip() for part in re.split(r",(?![^{]*\})", found[5])) if found[5] else ()
    return Instruction(found[3], bool(found[2]), tuple(found[4].split(".")), operands)


@dataclass
class Cta:
    """A CTA: its rank in the cluster, its row of the grid, and its shared memory."""

    rank: int
    row: int
    shared: Lanes


@dataclass
class Warp:
    """A warp's registers, and what it waits for: nothing, its CTA, its cluster, or it is done. arrived: the cluster's
    phase that it has arrived at."""

    cta: Cta
    number: int
    registers: dict[str, Lanes] = field(default_factory=dict)
    waits: str = ""
    arrived: int = -1

    def value(self, name: str, kind: str = "b32") -> Lanes:
        """Returns a register, a special one, or a constant."""
        special = {
            "%tid.x": np.arange(LANES) + LANES * self.number,
            "%ctaid.x": np.full(LANES, self.cta.rank),
            "%ctaid.y": np.full(LANES, self.cta.row),
            "%lanemask_lt": (1 << np.arange(LANES)) - 1,
            "__static_shmem__0": np.zeros(LANES),
        }
        if name in special:
            return special[name].astype(np.uint32)
        if name.startswith("%"):
            return self.registers[name]
        number = int(name.replace("0f", "0x"), 0)
        wide = kind.endswith("64")
        return np.full(LANES, number % (1 << (64 if wide else 32)), np.uint64 if wide else np.uint32)

    def put(self, name: str, value: Lanes, active: Lanes) -> None:
        """Sets a register in the active threads."""
        old = self.registers.get(name)
        if old is None or old.dtype != value.dtype:
            old = np.zeros(LANES, value.dtype)
        self.registers[name] = np.where(active, value, old)


class Machine:
    """Runs a program. tensors: by number, from 1, words of global memory; those in ``written`` may be stored to."""

    def __init__(self, program: Program, tensors: Sequence[Lanes], scalars: Sequence[int], written: set[int]) -> None:
        self._program, self._tensors, self._written = program, tensors, written
        addresses = [(number + 1) << SEGMENT_BITS for number in range(len(tensors))]
        self._parameters = dict(zip(program.parameters, (*addresses, *scalars), strict=True))
        self._ctas: list[Cta] = []
        self._phase = 0
        self.reached: set[int] = set()

    def run(self, cluster: int, num_rows: int, seed: int = 0) -> None:
        """Runs a cluster for each row, one after the other."""
        for row in range(num_rows):
            words = self._program.shared_bytes // 4
            self._ctas = [Cta(rank, row, np.full(words, UNSET, np.uint32)) for rank in range(cluster)]
            self._phase = 0
            with np.errstate(all="ignore"):
                self._run_cluster(Random(seed))

    def _run_cluster(self, random: Random) -> None:
        warps = [Warp(cta, number) for cta in self._ctas for number in range(self._program.num_threads // LANES)]
        steps = {id(warp): self._steps(warp) for warp in warps}
        while any(warp.waits != "done" for warp in warps):
            ready = [warp for warp in warps if not warp.waits]
            if ready:
                warp = random.choice(ready)
                warp.waits = next(steps[id(warp)], "done")
                left = [one for one in warps if one.waits != "done"]
                self._phase += bool(left) and all(one.arrived == self._phase for one in left)
            else:
                released = [warp for warp in warps if self._is_released(warp, warps)]
                assert released, "every warp waits for another"
                for warp in released:
                    warp.waits = ""

    def _is_released(self, warp: Warp, warps: Sequence[Warp]) -> bool:
        if warp.waits == "cluster":
            return warp.arrived < self._phase
        ours = [one.waits for one in warps if one.cta is warp.cta]
        return warp.waits == "cta" and all(waits in {"cta", "done"} for waits in ours)

    def _steps(self, warp: Warp) -> Iterator[str]:
        """Executes a warp; yields what it waits for."""
        places, end = np.zeros(LANES, int), len(self._program.instructions)
        while (place := int(places.min())) < end:
            one, here = self._program.instructions[place], places == place
            self.reached.add(place)
            places = np.where(here, place + 1, places)
            active = here if one.guard is None else here & (warp.registers[one.guard] ^ one.negated)
            name = one.parts[0]
            if name == "bra":
                places = np.where(active, self._program.labels[one.operands[0]], places)
            elif name == "ret":
                places = np.where(active, end, places)
            elif name in {"bar", "barrier"}:
                assert active.all(), f"{one} without some threads"
                if "arrive" in one.parts:
                    assert warp.arrived != self._phase, "a second arrival"
                    warp.arrived = self._phase
                yield "cta" if name == "bar" else "" if "arrive" in one.parts else "cluster"
            elif active.any() and name != "griddepcontrol":
                self._execute(one, warp, active)

    def _execute(self, one: Instruction, warp: Warp, active: Lanes) -> None:
        name, operands = one.parts[0], one.operands
        if name in {"ld", "st", "red", "atom"}:
            getattr(self, f"_{name}")(one, warp, active)
        elif name in {"redux", "vote", "shfl"}:
            assert active.all(), f"{one} without some threads"
            _exchange(one, warp)
        elif name == "mapa":
            remote = warp.value(operands[1]) + (warp.value(operands[2]) << np.uint32(RANK_BITS))
            warp.put(operands[0], remote, active)
        else:
            warp.put(operands[0], _compute(one, warp), active)

    def _ld(self, one: Instruction, warp: Warp, active: Lanes) -> None:
        names = [name.strip() for name in one.operands[0].strip("{}").split(",")]
        if "param" in one.parts:
            wide = one.kind.endswith("64")
            parameter = self._parameters[one.operands[1].strip("[]")]
            warp.put(names[0], np.full(LANES, parameter, np.uint64 if wide else np.uint32), active)
            return
        addresses = _addresses(warp, one.operands[1])
        for idx, name in enumerate(names):
            loaded = np.zeros(LANES, np.uint32)
            for lane in np.flatnonzero(active):
                words, place = self._locate(int(addresses[lane]), one, warp)
                assert not place % len(names), "an unaligned address"
                loaded[lane] = words[place + idx]
            warp.put(name, loaded, active)

    def _st(self, one: Instruction, warp: Warp, active: Lanes) -> None:
        addresses, values = _addresses(warp, one.operands[0]), warp.value(one.operands[1])
        for lane in np.flatnonzero(active):
            words, place = self._locate(int(addresses[lane]), one, warp)
            words[place] = values[lane]

    def _red(self, one: Instruction, warp: Warp, active: Lanes, first: int = 0) -> Lanes:
        addresses, values = _addresses(warp, one.operands[first]), warp.value(one.operands[first + 1])
        old, kind = np.zeros(LANES, np.uint32), np.dtype(SIGNED.get(one.kind, np.uint32))
        for lane in np.flatnonzero(active):
            words, place = self._locate(int(addresses[lane]), one, warp)
            old[lane] = words[place]
            pair = words[place : place + 1].view(kind), values[lane : lane + 1].view(kind)
            words[place : place + 1] = ARITHMETIC[one.parts[2]](*pair).view(np.uint32)
        return old

    def _atom(self, one: Instruction, warp: Warp, active: Lanes) -> None:
        warp.put(one.operands[0], self._red(one, warp, active, 1), active)

    def _locate(self, address: int, one: Instruction, warp: Warp) -> tuple[Lanes, int]:
        """Returns the memory that an address is in, and its word there."""
        words, offset = warp.cta.shared, address
        if one.parts[1] == "global":
            number, offset = address >> SEGMENT_BITS, address % (1 << SEGMENT_BITS)
            assert one.parts[0] == "ld" or number in self._written, f"tensor {number} is not written"
            words = self._tensors[number - 1]
        elif "cluster" in one.parts[1]:
            words, offset = self._ctas[address >> RANK_BITS].shared, address % (1 << RANK_BITS)
        assert not offset % 4
        assert offset // 4 < len(words), f"{one}: outside of memory"
        return words, offset // 4


def _addresses(warp: Warp, operand: str) -> Lanes:
    base, _, offset = operand.strip("[]").partition("+")
    addresses = warp.value(base)
    return addresses + addresses.dtype.type(offset or 0)


def _exchange(one: Instruction, warp: Warp) -> None:
    """Exchanges integers within a warp."""
    x, everyone = warp.value(one.operands[1]), np.ones(LANES, bool)
    lane = np.arange(LANES)
    if one.parts[0] == "redux":
        signed = x.view(np.int32)
        found = {"add": signed.sum(dtype=np.int32), "max": signed.max(), "min": signed.min()}[one.parts[2]]
        warp.put(one.operands[0], np.full(LANES, found).view(np.uint32), everyone)
    elif one.parts[0] == "vote":
        votes = (x.astype(np.uint64) << lane.astype(np.uint64)).sum()
        warp.put(one.operands[0], np.full(LANES, votes, np.uint32), everyone)
    else:
        distance = warp.value(one.operands[2]).astype(int)
        source = {"up": lane - distance, "bfly": lane ^ distance, "idx": distance % LANES}[one.parts[2]]
        goal, _, is_valid = one.operands[0].partition("|")
        warp.put(goal, np.where(source >= 0, x[source], x), everyone)
        if is_valid:
            warp.put(is_valid, source >= 0, everyone)


def _compute(one: Instruction, warp: Warp) -> Lanes:
    """Computes on each thread's own registers."""
    name, kind = one.parts[0], one.kind
    if kind == "pred":
        return _predicate(one, warp)
    if name == "selp":
        _, yes, no, choice = one.operands
        return np.where(warp.value(choice), warp.value(yes, kind), warp.value(no, kind))
    if name == "cvt":
        return _convert(one, warp)
    values = [warp.value(operand, kind) for operand in one.operands[1:]]
    if name == "setp":
        return COMPARE[one.parts[1]](*(_typed(value, kind) for value in values))
    if name == "mov":
        return values[0]
    if name in BITS:
        return np.array([BITS[name](int(value)) for value in values[0]], np.uint32)
    if kind == "f32":
        return FLOATS[name](*(value.view(np.float32) for value in values)).view(np.uint32)
    if name in LOGIC:
        return LOGIC[name](*values)
    return _integers(one, warp, values)


BITS = {
    "popc": lambda x: x.bit_count(),
    "brev": lambda x: int(f"{x:032b}"[::-1], 2),
    "bfind": lambda x: 32 - x.bit_length() if x else 0xFFFFFFFF,  # .shiftamt
}


def _predicate(one: Instruction, warp: Warp) -> Lanes:
    values = [
        warp.value(name) if name.startswith("%") else np.full(LANES, int(name, 0) != 0) for name in one.operands[1:]
    ]
    return values[0] if one.parts[0] == "mov" else LOGIC[one.parts[0]](*values)


def _typed(value: Lanes, kind: str) -> Lanes:
    return value.view(np.float32) if kind == "f32" else value.view(SIGNED[kind]) if kind in SIGNED else value


def _convert(one: Instruction, warp: Warp) -> Lanes:
    goal, source = one.parts[-2:]
    value = _typed(warp.value(one.operands[1]), source)
    if source == "f32":
        assert one.parts[1:] == ("rzi", "s32", "f32")
        clipped = np.clip(np.nan_to_num(value.astype(np.float64), posinf=np.inf, neginf=-np.inf), -(2**31), 2**31 - 1)
        return clipped.astype(np.int64).astype(np.int32).view(np.uint32)
    bits = np.uint64 if goal.endswith("64") else np.uint32
    return value.astype(SIGNED.get(goal, bits)).view(bits)


def _integers(one: Instruction, warp: Warp, values: list[Lanes]) -> Lanes:
    name, kind = one.parts[0], one.kind
    if "wide" in one.parts:
        wide = np.int64 if kind in SIGNED else np.uint64
        x, y = (_typed(warp.value(operand), kind).astype(wide) for operand in one.operands[1:3])
        return (x * y).view(np.uint64)
    typed = [_typed(value, kind) for value in values]
    if name in {"shl", "shr"}:
        width = 8 * values[0].dtype.itemsize
        distance = warp.value(one.operands[2]).astype(np.uint64)
        shift = np.minimum(distance, width - 1).astype(typed[0].dtype)
        found = typed[0] << shift if name == "shl" else typed[0] >> shift
        return np.where((distance >= width) & (name == "shl" or kind not in SIGNED), 0, found).view(values[0].dtype)
    if name == "neg":
        return (-typed[0]).view(values[0].dtype)
    if name in {"div", "rem"}:
        x, y = (value.astype(np.int64) for value in typed)
        quotient = np.sign(x) * np.sign(y) * (abs(x) // np.maximum(abs(y), 1))
        return (quotient if name == "div" else x - quotient * y).astype(typed[0].dtype).view(values[0].dtype)
    if name == "mad":
        return values[0] * values[1] + values[2]
    return ARITHMETIC[name](*typed[:2]).view(values[0].dtype)
