"""Machine code that counts itself: how often each SASS instruction of a kernel runs in a given launch.

``nvdisasm`` tells what the instructions are, not how often they run: ptxas unrolls run-time loops, adds remainder loops
and branches around guarded code. So the *scalar slice* of a kernel is emulated: the integer instructions that branch
conditions depend on, for one thread at a time, from the launch's own arguments, program ids and thread number. Every
branch is then followed as the device would follow it, and each basic block counts its executions.

What is loaded from memory is unknown. Where a branch depends on it:

* if it decides whether a loop goes on, there is no count to give: `UnknownTripCountError`;
* else the side with fewer instructions up to where both sides meet is taken (a check for rare values jumps over its
  fallback), and the branch is listed in `Execution.rare_paths` with what was left out.

A wait for an asynchronous copy or a tensor core succeeds at once. A warp runs a block if any of its lanes does; lanes 0
and 31 stand for a warp, and a value broadcast from one lane is taken to be the same in all.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx

__all__ = ["Execution", "Instruction", "Loop", "Program", "RarePath", "UnknownTripCountError", "parse"]

MASK = 0xFFFFFFFF
# Where registers start in the emulator's state.
_UNIFORM, _PREDICATE, _UNIFORM_PREDICATE = 256, 512, 520
# Local memory, where spilled registers go, is one more register that holds a dict.
_LOCAL = 528
_MAX_BLOCKS = 20_000_000
# Programs emulated for one launch where the count depends on them: at most, at least, and by the work that they take,
# in emulated instructions.
_MAX_PROGRAMS, _LEAST_PROGRAMS, _WORK = 64, 5, 200_000


class UnknownTripCountError(RuntimeError):
    """A loop's end depends on data, so that nothing can be said about the kernel's cost."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its guard (``"!P0"`` or ``""``), opcode with modifiers, and operands."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """What follows the opcode's dots."""
        return tuple(self.opcode.split(".")[1:])


@dataclass
class Block:
    """Instructions that run one after another."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)

    @property
    def last(self) -> Instruction:
        """The instruction that decides what runs next."""
        return self.instructions[-1]


@dataclass(frozen=True)
class Loop:
    """A loop of a launch: where it starts, its instructions, how often it is entered and its body's mean runs."""

    address: int
    instructions: int
    entries: float
    trips: float


@dataclass(frozen=True)
class RarePath:
    """A branch on data: where, instructions of the side not taken, and how often it came up per warp."""

    address: int
    instructions: int
    times: float


@dataclass(frozen=True)
class Execution:
    """What a launch executes, summed over its warps.

    Attributes:
        warps: warps of all programs.
        instructions: executions by opcode with modifiers, those included that only take an issue slot, because...
        idle: ... their guard is false in every lane.
        tensor_macs: multiply-adds of matrix instructions, by opcode with modifiers.
        loops: the loops that ran.
        rare_paths: branches on data.
        programs_seen: programs that were emulated.
    """

    warps: int
    instructions: Mapping[str, float]
    idle: Mapping[str, float]
    tensor_macs: Mapping[str, float]
    loops: tuple[Loop, ...]
    rare_paths: tuple[RarePath, ...]
    programs_seen: int

    @property
    def total(self) -> float:
        """Warp instructions of the launch."""
        return sum(self.instructions.values())


# --- parsing -------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^([.$\w]+):\s*$")


def parse(text: str) -> Program:
    """Build the control-flow graph of a kernel from the output of ``nvdisasm -c``."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(line):
            operands = tuple(part.strip().replace(".reuse", "") for part in found[4].split(",")) if found[4] else ()
            instructions.append(Instruction(int(found[1], 16), found[2] or "", found[3], operands))
    if not instructions:
        raise ValueError("no instructions recognised in the machine code")
    return Program(instructions, labels)


_JUMPS = {"BRA", "JMP", "CALL", "RET", "EXIT", "BPT", "KILL"}
_REFUSED = {"BRX", "BRXU", "JMX", "JMXU"}
_TRAPS = {"BPT", "KILL"}
_ENDS = {"EXIT", "RET"} | _TRAPS


def _target(instruction: Instruction) -> str:
    found = re.search(r"`\((.+)\)", instruction.operands[-1])
    if found is None:
        raise ValueError(f"no target in {instruction}")
    return found[1]


def _is_jump(instruction: Instruction) -> bool:
    # BRA.DIV leaves only where the lanes of a warp have parted ways, which they have not here.
    return instruction.base in _JUMPS and "DIV" not in instruction.modifiers


class Program:
    """A kernel's control-flow graph, and its emulator."""

    def __init__(self, instructions: Sequence[Instruction], labels: Mapping[str, int]) -> None:
        refused = [i for i in instructions if i.base in _REFUSED]
        if refused:
            raise NotImplementedError(f"indirect branches are not followed: {refused[0]}")
        starts = {0} | {at for at in labels.values() if at < len(instructions)}
        starts |= {at + 1 for at, i in enumerate(instructions[:-1]) if _is_jump(i)}
        order = sorted(starts)
        number = {start: index for index, start in enumerate(order)}
        self.blocks = [
            Block(list(instructions[start:stop])) for start, stop in itertools.pairwise([*order, len(instructions)])
        ]
        self.targets: dict[int, int] = {}
        for index, block in enumerate(self.blocks):
            last, following = block.last, [index + 1] if index + 1 < len(self.blocks) else []
            if not _is_jump(last):
                block.successors = following
            elif last.base in _ENDS:
                block.successors = following if last.guard else []
            else:
                target = self.targets[index] = number[labels[_target(last)]]
                conditional = bool(self._conditions(last)) or last.base == "CALL"
                block.successors = [target, *(following if conditional else [])]
        traps = {i for i, block in enumerate(self.blocks) if block.last.base in _TRAPS and not block.last.guard}
        for index, block in enumerate(self.blocks):
            if block.last.base == "CALL" and self.targets[index] in traps:
                block.successors = [self.targets[index]]  # nothing comes back
        self.graph = networkx.DiGraph()
        self.graph.add_nodes_from(range(len(self.blocks)))
        for index, block in enumerate(self.blocks):
            self.graph.add_edges_from((index, successor) for successor in block.successors)
        # The predicates that decide each jump, as places in the state, with whether they are negated.
        self._guards = {
            index: [(_index(p.lstrip("!")), p[0] == "!") for p in self._conditions(block.last)]
            for index, block in enumerate(self.blocks)
            if _is_jump(block.last)
        }
        matrix = {i: [x for x in block.instructions if x.base in _MATRIX] for i, block in enumerate(self.blocks)}
        self._matrix = {index: instructions for index, instructions in matrix.items() if instructions}
        self._compile()

    # --- structure --------------------------------------------------------------------------------------------------

    @staticmethod
    def _conditions(jump: Instruction) -> list[str]:
        """The predicates that must all hold for a jump to be taken."""
        extra = [o for o in jump.operands if re.fullmatch(r"!?U?P[0-9T]", o)] if jump.base == "BRA" else []
        return [p for p in [jump.guard, *extra] if p not in ("", "PT", "UPT")]

    @functools.cached_property
    def loops(self) -> dict[int, set[int]]:
        """Natural loops: the blocks of each, by header."""
        idom = networkx.immediate_dominators(self.graph, 0)

        def dominates(a: int, b: int) -> bool:
            while b != a and idom.get(b, b) not in (b, None):
                b = idom[b]
            return a == b

        found: dict[int, set[int]] = defaultdict(set)
        for source, header in self.graph.edges:
            if source in idom and dominates(header, source):
                body, waiting = {header}, [source]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += [b for b in self.graph.predecessors(block) if b in idom]
                found[header] |= body
        return dict(found)

    @functools.cached_property
    def _meeting_points(self) -> dict[int, int]:
        """For each block the next one that every path to the kernel's end (-1) passes; none where all paths trap."""
        backwards = self.graph.reverse(copy=True)
        for index, block in enumerate(self.blocks):
            if block.last.base in _ENDS - _TRAPS:
                backwards.add_edge(-1, index)
        return networkx.immediate_dominators(backwards, -1)

    def _side(self, start: int, end: int) -> tuple[int, int]:
        """Instructions of the shortest path from `start` to `end`, and of all blocks that lie between them."""
        best = {start: 0}
        waiting = [start]
        while waiting:
            block = waiting.pop(0)
            if block == end:
                continue
            length = best[block] + len(self.blocks[block].instructions)
            for successor in self.blocks[block].successors or [-1]:
                if length < best.get(successor, math.inf):
                    best[successor] = length
                    waiting.append(successor)
        between = sum(len(self.blocks[b].instructions) for b in best if b not in (end, -1))
        return int(best[end]), between

    def _subroutine_size(self, entry: int) -> int:
        inside = networkx.descendants(self.graph, entry) | {entry}
        return sum(len(self.blocks[b].instructions) for b in inside)

    # --- translation of the scalar slice to Python ------------------------------------------------------------------

    def _compile(self) -> None:
        translated = [[_translate(i) for i in block.instructions] for block in self.blocks]
        kept = self._slice(translated)
        self.uses = {name for block in translated for e in block if e is not None and e in kept for name in e.specials}
        self._sizes = [sum(e in kept for e in block) for block in translated]
        lines = []
        for index, block in enumerate(translated):
            body = []
            for instruction, effect in zip(self.blocks[index].instructions, block, strict=True):
                if instruction.guard and not _is_jump(instruction):
                    body.append(f"if {_predicate(instruction.guard)} == 0: s.off[{instruction.address}] += 1")
                if effect is not None and effect in kept:
                    body += effect.code
                if instruction.base in _DESCRIBED:
                    body.append(f"s.describe({instruction.address}, r[{_described(instruction)}])")
            lines += [f"def block{index}(r, k, s):", *(f"    {line}" for line in body or ["pass"])]
        space = dict(_HELPERS)
        exec(compile("\n".join(lines), "<scalar slice>", "exec"), space)
        self._run: list[Callable[..., None]] = [space[f"block{index}"] for index in range(len(self.blocks))]

    def _slice(self, translated: Sequence[Sequence[_Effect | None]]) -> set[_Effect]:
        """The effects that a jump, a guard or the shape of a matrix instruction may depend on."""
        before: dict[int, set[int]] = defaultdict(set)
        for source, target in self.graph.edges:
            before[target].add(source)
        for index, block in enumerate(self.blocks):
            if block.last.base == "CALL":
                subroutine = networkx.descendants(self.graph, self.targets[index]) | {self.targets[index]}
                before[index + 1] |= {b for b in subroutine if self.blocks[b].last.base == "RET"}
        waiting: list[tuple[int, int, int]] = []  # a register that is needed at a place of a block
        for index, block in enumerate(self.blocks):
            if _is_jump(block.last):
                waiting += [
                    (index, len(block.instructions), _index(p.lstrip("!"))) for p in self._conditions(block.last)
                ]
            for place, instruction in enumerate(block.instructions):
                if instruction.base in _DESCRIBED:
                    waiting.append((index, place, _described(instruction)))
                if instruction.guard:
                    waiting.append((index, place, _index(instruction.guard.lstrip("!"))))
        kept: set[_Effect] = set()
        seen: set[tuple[int, int]] = set()  # registers needed at a block's end
        while waiting:
            index, place, register = waiting.pop()
            for at in reversed(range(place)):
                effect = translated[index][at]
                if effect is None or register not in effect.writes:
                    continue
                if effect not in kept:
                    kept.add(effect)
                    waiting += [(index, at, read) for read in effect.reads]
                if not effect.partial:
                    break
            else:
                for source in before[index]:
                    if (source, register) not in seen:
                        seen.add((source, register))
                        waiting.append((source, len(translated[source]), register))
        return kept

    # --- emulation --------------------------------------------------------------------------------------------------

    def _decide(self, index: int, registers: list[Any]) -> int | None:
        """Whether the jump that ends a block is taken; None if that is unknown."""
        result: int | None = 1
        for register, negated in self._guards[index]:
            value = registers[register]
            result = _and(result, value if value is None or not negated else 1 - value)
        return result

    def _on_data(self, index: int, taken: int) -> tuple[int, int, int]:
        """Choose a side of a branch on data: where to go on, instructions of the side left out, and where it starts.

        None are left out where all of that side ends in a trap; such a side has no start (-1).
        """
        here, following = self.blocks[index].last, index + 1
        if here.base in _TRAPS:
            return following, 0, -1
        if here.base in _ENDS:
            # What follows runs for rare values only.
            rest = networkx.descendants(self.graph, following) | {following}
            return -1, sum(len(self.blocks[b].instructions) for b in rest), following
        if here.base == "CALL":
            return following, self._subroutine_size(taken), -1
        for header, body in self.loops.items():
            if index in body and (taken in body) != (following in body):
                start = self.blocks[header].instructions[0].address
                raise UnknownTripCountError(
                    f"the loop at {start:#06x} goes on or ends by data loaded from memory (branch at "
                    f"{here.address:#06x}): its trip count cannot be told"
                )
        end = self._meeting_points[index]
        alive = [side for side in (following, taken) if side in self._meeting_points]
        if len(alive) == 1:
            return alive[0], 0, -1
        sides = {side: self._side(side, end) for side in (following, taken)}
        chosen = min(sides, key=lambda side: sides[side][0])
        (other,) = [side for side in sides if side != chosen]
        return chosen, sides[other][1], other

    def trace(self, special: Mapping[str, int | None], constants: Mapping[int, int]) -> Trace:
        """Follow one thread to its end."""
        # What nothing has written may be read where its value cannot matter: predicates packed in bits.
        registers: list[Any] = [0] * _LOCAL + [{}]
        return self._follow(0, -1, registers, _State(special), constants)

    def _follow(self, index: int, end: int, registers: list[Any], state: _State, constants: Mapping[int, int]) -> Trace:
        """Follow one thread from a block up to another, or to the kernel's end (-1)."""
        edges: Counter[tuple[int, int]] = Counter()
        rare: Counter[tuple[int, int]] = Counter()
        stack: list[int] = []
        budget = _MAX_BLOCKS
        previous = -1
        while index != end:
            edges[previous, index] += 1
            budget -= 1
            if budget == 0:
                raise UnknownTripCountError("the kernel did not end: is there a loop that waits for another program?")
            self._run[index](registers, constants, state)
            previous = index
            if index not in self._guards:
                index += 1
                continue
            last = self.blocks[index].last
            decision = self._decide(index, registers)
            if decision is None:
                branch = index
                index, left_out, other = self._on_data(branch, self.targets.get(branch, -1))
                if left_out:
                    rare[last.address, left_out] += 1
                if branch not in state.tried and other >= 0:
                    # Nothing of it counts, but a loop that ends by data must not pass for a rare one that is left out.
                    state.tried.add(branch)
                    self._follow(other, self._meeting_points[branch], registers[:], state.copy(), constants)
            elif not decision:
                index += 1
            elif last.base == "RET":
                index = stack.pop() if stack else end
            elif last.base in _ENDS:
                index = end
            else:
                if last.base == "CALL":
                    stack.append(index + 1)
                index = self.targets[index]
        return _trace(edges, rare, state)

    def execute(self, grid: Sequence[int], num_warps: int, constants: Mapping[int, int]) -> Execution:
        """Count what a launch executes.

        Args:
            grid: programs along each axis.
            num_warps: warps of a program.
            constants: 32-bit words of constant bank 0, by offset; what is not in it is unknown.
        """
        axes = [f"SR_CTAID.{axis}" for axis in "XYZ"]
        first_program = dict.fromkeys(axes, 0) | {"SR_CgaCtaId": 0}
        trial = self.trace(first_program | _thread(0, 0), constants)
        work = 1 + sum(times * self._sizes[block] for block, times in trial.blocks.items())
        limit = max(_LEAST_PROGRAMS, min(_MAX_PROGRAMS, _WORK // work))
        programs = _sample(grid, [axis in self.uses for axis in axes], limit)
        by_thread = not self.uses.isdisjoint(("SR_TID.X", "SR_LANEID", "lane"))
        warps = range(num_warps) if by_thread else range(1)
        lanes = (0, 31) if by_thread else (0,)
        counts: Counter[int] = Counter()
        edges: Counter[tuple[int, int]] = Counter()
        rare: Counter[tuple[int, int]] = Counter()
        off: Counter[int] = Counter()
        macs: Counter[str] = Counter()
        known: dict[Any, tuple[Trace, list[Trace]]] = {}
        for order, (program, weight) in enumerate(programs):
            special: dict[str, int | None] = {**dict(zip(axes, program, strict=True)), "SR_CgaCtaId": 0}
            first = self.trace(special | _thread(0, 0), constants)
            # Programs whose first threads agree are taken to be alike, but for the last one, which may be cut off.
            key = frozenset(first.edges.items())
            if key not in known or order == len(programs) - 1:
                traces = [
                    _warp([self.trace(special | _thread(warp, lane), constants) for lane in lanes]) for warp in warps
                ]
                known[key] = first, traces
            like, traces = known[key]
            share = weight * num_warps / len(warps)
            for trace in traces:
                tallies = [(edges, trace.edges), (rare, trace.rare), (counts, trace.blocks), (off, trace.off)]
                if first is not like:  # guards that differ in the first thread differ in all
                    tallies += [(off, first.off), (off, {at: -times for at, times in like.off.items()})]
                for counter, found in tallies:
                    for name, times in found.items():
                        counter[name] += times * share
                for name, amount in self._tensor_macs(trace).items():
                    macs[name] += amount * share
        executed: Counter[str] = Counter()
        idle: Counter[str] = Counter()
        for block, times in counts.items():
            for instruction in self.blocks[block].instructions:
                executed[instruction.opcode] += times
                idle[instruction.opcode] += max(0, off[instruction.address])
        total = math.prod(grid) * num_warps
        loops = []
        for header, body in sorted(self.loops.items()):
            entries = sum(n for (source, target), n in edges.items() if target == header and source not in body)
            if entries:
                size = sum(len(self.blocks[b].instructions) for b in body)
                address = self.blocks[header].instructions[0].address
                loops.append(Loop(address, size, entries / total, counts[header] / entries))
        paths = tuple(RarePath(at, size, times / total) for (at, size), times in sorted(rare.items()))
        return Execution(total, executed, +idle, macs, tuple(loops), paths, len(programs))

    def _tensor_macs(self, trace: Trace) -> Counter[str]:
        """Multiply-adds of one warp's matrix instructions."""
        found: Counter[str] = Counter()
        for block, instructions in self._matrix.items():
            if times := trace.blocks[block]:
                for instruction in instructions:
                    tf32 = ".TF32" if _is_tf32(trace.described.get(instruction.address, 0)) else ""
                    found[instruction.opcode + tf32] += times * _macs(instruction, trace.described)
        return found


@dataclass(frozen=True)
class Trace:
    """A way through a kernel: how often each edge and block ran, and which branches hung on data.

    Attributes:
        off: how often an instruction was passed with its guard false, by address.
    """

    edges: Counter[tuple[int, int]]
    rare: Counter[tuple[int, int]]
    off: Counter[int]
    described: dict[int, int]
    blocks: Counter[int]


def _trace(edges: Counter[tuple[int, int]], rare: Counter[tuple[int, int]], state: _State) -> Trace:
    blocks: Counter[int] = Counter()
    for (_, target), times in edges.items():
        blocks[target] += times
    return Trace(edges, rare, state.off, state.described, blocks)


def _warp(lanes: Sequence[Trace]) -> Trace:
    """What a warp runs: whatever any of its lanes does."""
    edges: Counter[tuple[int, int]] = Counter()
    rare: Counter[tuple[int, int]] = Counter()
    for lane in lanes:
        edges |= lane.edges  # the greater count of each
        rare |= lane.rare
    blocks: Counter[int] = Counter()
    for lane in lanes:
        blocks |= lane.blocks
    off = lanes[0].off
    for lane in lanes[1:]:
        off = off & lane.off  # the smaller count of each
    return Trace(edges, rare, off, lanes[0].described, blocks)


class _State:
    """What an emulated thread has besides registers."""

    def __init__(self, special: Mapping[str, int | None]) -> None:
        self.special = special
        self.described: dict[int, int] = {}
        self.off: Counter[int] = Counter()
        self.tried: set[int] = set()

    def copy(self) -> _State:
        """A state for a trial: the branches tried so far are shared."""
        found = _State(self.special)
        found.tried = self.tried
        return found

    def describe(self, address: int, descriptor: int | None) -> None:
        """Keep the descriptor that tells a matrix instruction's shape."""
        if descriptor is None:
            raise ValueError(f"the matrix instruction at {address:#06x} has an unknown shape")
        self.described[address] = descriptor


def _thread(warp: int, lane: int) -> dict[str, int]:
    return {"SR_TID.X": 32 * warp + lane, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": lane, "lane": lane}


def _sample(grid: Sequence[int], depends: Sequence[bool], limit: int) -> list[tuple[tuple[int, ...], float]]:
    """Choose program ids to emulate, each with the number of programs that it stands for.

    All of them where they are few; else the first, the last and others between at odd distances, so that no period of
    the kernel's own is hit. Axes that no branch depends on stand still.
    """
    sizes = [size if used else 1 for size, used in zip(grid, depends, strict=True)]
    total = math.prod(sizes)
    if total <= limit:
        chosen = list(range(total))
        weights = [1.0] * total
    else:
        golden = (math.sqrt(5) - 1) / 2
        inner = {1 + int((n + (n * golden) % 1) * (total - 2) / (limit - 2)) for n in range(limit - 2)}
        chosen = [0, *sorted(min(n, total - 2) for n in inner), total - 1]
        weights = [1.0, *[(total - 2) / (len(chosen) - 2)] * (len(chosen) - 2), 1.0]
    factor = math.prod(grid) / total
    programs = [(n % sizes[0], n // sizes[0] % sizes[1], n // sizes[0] // sizes[1]) for n in chosen]
    return [(program, factor * weight) for program, weight in zip(programs, weights, strict=True)]


# --- matrix instructions -------------------------------------------------------------------------------------------

_MATRIX = {"HMMA", "HGMMA", "UTCHMMA", "DMMA", "IMMA", "BMMA", "QGMMA", "IGMMA", "BGMMA", "UTCQMMA", "UTCIMMA"}
_DESCRIBED = {"UTCHMMA"}
"""Matrix instructions whose shape is in a register."""


def _described(instruction: Instruction) -> int:
    (register,) = [o for o in instruction.operands if o.startswith("idesc[")]
    return _index(register[len("idesc[") : -1])


def _is_tf32(descriptor: int) -> bool:
    return descriptor >> 7 & 7 == 2


def _macs(instruction: Instruction, described: Mapping[int, int]) -> float:
    """Multiply-adds of a matrix instruction, per warp that executes it."""
    if instruction.base == "HGMMA":  # a quarter of what its four warps do together
        m, n, k = map(int, instruction.modifiers[0].split("x"))
        return m * n * k / 4
    if instruction.base == "HMMA":
        shapes = {"1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "884": 8 * 8 * 4}
        return shapes[instruction.modifiers[0]]
    if instruction.base == "UTCHMMA":
        # PTX ISA, tcgen05 instruction descriptor: a's format in bits 7-9 (2 is tf32), N/8 in 17-22, M/16 in 24-28.
        word = described[instruction.address]
        k = 8 if _is_tf32(word) else 16
        return (word >> 17 & 63) * 8 * (word >> 24 & 31) * 16 * k
    raise NotImplementedError(f"matrix instruction {instruction.opcode} at {instruction.address:#06x}")


# --- the meaning of integer instructions ---------------------------------------------------------------------------


def _and(a: int | None, b: int | None) -> int | None:
    return 0 if a == 0 or b == 0 else None if a is None or b is None else 1


def _or(a: int | None, b: int | None) -> int | None:
    return 1 if a == 1 or b == 1 else None if a is None or b is None else 0


def _xor(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a ^ b


def _not(a: int | None) -> int | None:
    return None if a is None else 1 - a


def _sgn(x: int) -> int:
    return (x ^ 0x80000000) - 0x80000000


def _sgn64(x: int) -> int:
    return (x ^ (1 << 63)) - (1 << 63)


def _lut(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for case in range(8):
        if table >> case & 1:
            result |= (a if case & 4 else a ^ MASK) & (b if case & 2 else b ^ MASK) & (c if case & 1 else c ^ MASK)
    return result


def _plut(a: int | None, b: int | None, c: int | None, table: int) -> int | None:
    """The same of three predicates; known if it is the same whatever the unknown ones are."""
    values = itertools.product(*((0, 1) if x is None else (x,) for x in (a, b, c)))
    found = {table >> (4 * x + 2 * y + z) & 1 for x, y, z in values}
    return found.pop() if len(found) == 1 else None


def _permute(a: int, selector: int, b: int) -> int:
    data = a | b << 32
    result = 0
    for position in range(4):
        nibble = selector >> 4 * position & 15
        byte = data >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * position
    return result


def _shift(mods: Sequence[str], low: int, amount: int, high: int) -> int:
    wide = "U64" in mods or "S64" in mods
    amount = amount & 31 if "W" in mods else min(amount, 63 if wide else 32)
    value = low | high << 32
    if "L" in mods:
        return (value << amount >> (32 if "HI" in mods else 0)) & MASK
    if "S32" in mods or "S64" in mods:
        value = _sgn64(value)
    return (value >> amount >> (32 if "HI" in mods else 0)) & MASK


def _to_float(value: int, up: bool) -> int:
    """Bits of the float32 nearest to an integer, or just above it."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if up and struct.unpack("<f", struct.pack("<I", bits))[0] < value:
        bits += 1
    return bits


def _from_float(bits: int, limit: int) -> int:
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    return min(max(int(value), 0), limit) if math.isfinite(value) else limit


def _reciprocal(bits: int) -> int:
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    (result,) = struct.unpack("<I", struct.pack("<f", 1 / value if value else math.inf))
    return result


def _halves(high: str, low: str) -> int:
    (value,) = struct.unpack("<I", struct.pack("<ee", float(low), float(high)))
    return value


def _compare(name: str, a: int, b: int, less: int | None = None) -> int | None:
    """Compare; with `less`, the verdict on the lower words, which decides between equal upper ones."""
    if less is not None and a == b:
        return less
    found = {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "T": True, "F": False}
    return int(found[name])


_HELPERS: dict[str, Any] = {
    "_UNKNOWN": (TypeError, AttributeError),  # what None raises in arithmetic, and as a place in local memory
    "M": MASK,
    "M64": MASK << 32 | MASK,
    "_and": _and,
    "_or": _or,
    "_xor": _xor,
    "_not": _not,
    "_sgn": _sgn,
    "_sgn64": _sgn64,
    "_lut": _lut,
    "_plut": _plut,
    "_permute": _permute,
    "_shift": _shift,
    "_to_float": _to_float,
    "_from_float": _from_float,
    "_reciprocal": _reciprocal,
    "_compare": _compare,
}


@dataclass(eq=False)
class _Effect:
    """An instruction in Python: registers written (always, or in part of the cases) and read, special registers."""

    code: list[str]
    writes: set[int]
    reads: set[int]
    specials: set[str]
    partial: bool


class _Unknown(Exception):  # noqa: N818 (not an error: the translation has no word for an operand)
    """An operand that the emulator has no value for."""


_REGISTER = re.compile(r"(U?)(R|P)(Z|T|\d+)")


def _index(name: str) -> int:
    """Where a register lives in the state; -1 for those that are constant."""
    found = _REGISTER.fullmatch(name)
    if found is None:
        raise _Unknown(name)
    if not found[3].isdigit():
        return -1
    base = {"R": 0, "UR": _UNIFORM, "P": _PREDICATE, "UP": _UNIFORM_PREDICATE}[found[1] + found[2]]
    return base + int(found[3])


def _is_predicate(token: str) -> bool:
    return re.fullmatch(r"!?U?P(T|\d)", token) is not None


def _predicate(token: str) -> str:
    name = token.lstrip("!")
    if not _is_predicate(token):
        raise _Unknown(token)
    value = "1" if name.endswith("T") else f"r[{_index(name)}]"
    return f"_not({value})" if token[0] == "!" else value


def _word(token: str, part: int = 0, carry: bool = False) -> str:
    """An operand's 32 bits as Python; `part` 1 is the upper word of a pair. With `carry`, -x is ~x + 1 in 33 bits."""
    sign = token[0] if token[0] in "-~|" else ""
    name = token.strip("-~|")
    if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", name):
        value = f"k.get({int(found[1], 16) + 4 * part})"
    elif re.fullmatch(r"0x[0-9a-f]+", name):
        number = int(name, 16) * (-1 if sign == "-" else 1)
        if sign == "~":
            raise _Unknown(token)
        return str((number >> 32 * part) & MASK)
    elif re.fullmatch(r"U?R(Z|\d+)", name):
        index = _index(name)
        value = "0" if index < 0 else f"r[{index + part}]"
    else:
        raise _Unknown(token)
    if sign == "-":
        return f"(({value} ^ M) + 1)" if carry else f"(-{value} & M)"
    if sign == "~":
        return f"({value} ^ M)"
    if sign == "|":
        return f"abs(_sgn({value}))"
    return value


def _pair(token: str) -> str:
    if token.startswith("0x"):
        return str(int(token, 16))
    if token.startswith(("-", "~")):
        inner = _pair(token[1:])
        return f"(-{inner} & M64)" if token[0] == "-" else f"({inner} ^ M64)"
    return f"({_word(token)} | {_word(token, 1)} << 32)"


# Instructions that write no register.
_SILENT = re.compile(
    r"ST[GSLA]?|STSM|STTM|STAS|U?RED[GS]?|BAR|UCGABAR\w*|MEMBAR|FENCE|LDGSTS|LDGDEPBAR|U?DEPBAR|WARPSYNC|BSSY|BSYNC|BREAK|NOP|"
    r"ERRBAR|CCTL\w*|UTMA\w+|UBLK\w+|UTC(?!ATOM)\w+|WARPGROUP\w*|NANOSLEEP|UVIRTCOUNT|ACQBULK|PREEXIT|YIELD|ARRIVES|"
    r"USETMAXREG|BMOV|PMTRIG|ENDCOLLECTIVE"
)


def _width(instruction: Instruction) -> int:
    """How many registers an instruction may write."""
    mods = instruction.modifiers
    if instruction.base == "HGMMA":
        _, n, _ = map(int, mods[0].split("x"))
        return n // 2
    if instruction.base == "LDTM":
        return max([int(m[1:]) for m in mods if re.fullmatch(r"x\d+", m)], default=128)
    if instruction.base == "LDSM":
        return int(mods[-1]) if mods[-1].isdigit() else 1
    if instruction.base == "HMMA":
        return 4 if "F32" in mods else 2
    if "256" in mods:
        return 8
    if "128" in mods:
        return 4
    pairs = {"64", "WIDE", "U64", "S64", "F64"}
    return (
        2
        if not pairs.isdisjoint(mods) or instruction.base in ("DADD", "DMUL", "DFMA", "FADD2", "FMUL2", "FFMA2", "CS2R")
        else 1
    )


def _destinations(instruction: Instruction) -> set[int]:
    """Registers that an instruction of no known meaning writes: leading predicates, a register, predicates after it."""
    found: set[int] = set()
    seen = False
    for token in instruction.operands:
        if _is_predicate(token) and token[0] != "!":
            if seen and instruction.base in ("VOTE", "VOTEU", "SEL", "FSEL"):
                break
            found.add(_index(token))
        elif not seen and re.fullmatch(r"U?R(Z|\d+)", token):
            seen = True
            if (start := _index(token)) >= 0:
                found |= {start + n for n in range(_width(instruction))}
            if instruction.base == "LDG" and "256" in instruction.modifiers:
                break
        else:
            break
    return found - {-1}


def _translate(instruction: Instruction) -> _Effect | None:
    """An instruction's effect on registers; None if it has none that a branch could depend on."""
    base = instruction.base
    if base in _JUMPS or (base != "STL" and _SILENT.fullmatch(base)):
        return None
    if base.startswith("SYNCS") and "PHASECHK" not in instruction.modifiers:
        return None
    try:
        assignments, specials = _assignments(instruction)
    except _Unknown:
        assignments, specials = [(n, "None") for n in sorted(_destinations(instruction))], set()
    assignments = [(n, code) for n, code in assignments if n >= 0]
    if not assignments:
        return None
    left = ", ".join(f"r[{n}]" for n, _ in assignments)
    unknown = " = ".join(f"r[{n}]" for n, _ in assignments) + " = None"
    if {code for _, code in assignments} == {"None"}:
        code = [unknown]
    else:
        code = [
            "try:",
            f"    {left} = {', '.join(code for _, code in assignments)}",
            "except _UNKNOWN:",
            f"    {unknown}",
        ]
    if instruction.guard:
        guard = _predicate(instruction.guard)
        code = [f"g = {guard}", "if g:", *(f"    {line}" for line in code), "elif g is None:", f"    {unknown}"]
    sources = [code for _, code in assignments] + code[:1] * bool(instruction.guard)
    reads = {int(n) for source in sources for n in re.findall(r"r\[(\d+)\]", source)}
    return _Effect(code, {n for n, _ in assignments}, reads, specials, partial=bool(instruction.guard))


def _assignments(instruction: Instruction) -> tuple[list[tuple[int, str]], set[str]]:
    """What an instruction assigns to which registers, as Python expressions that raise TypeError on None."""
    base, mods, ops = instruction.base, instruction.modifiers, list(instruction.operands)
    # Uniform registers have instructions of their own with the same meanings.
    plain = base[1:] if base.startswith("U") and base[1:] in _MEANINGS else base
    if plain == "LDCU" or plain == "ULDC":
        plain = "LDC"
    meaning = _MEANINGS.get(plain)
    if meaning is None:
        raise _Unknown(base)
    specials: set[str] = set()
    return meaning(mods, ops, specials), specials


Assignments = list[tuple[int, str]]
_MEANINGS: dict[str, Callable[[Sequence[str], list[str], set[str]], Assignments]] = {}


def _means(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        for name in names:
            _MEANINGS[name] = function
        return function

    return register


def _outputs(ops: list[str]) -> tuple[int, list[int]]:
    """Take an instruction's register and the predicates after it off its operands."""
    register = _index(ops.pop(0))
    predicates = []
    while ops and _is_predicate(ops[0]):
        predicates.append(_index(ops.pop(0)))
    return register, predicates


@_means("MOV")
def _mov(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if "64" in mods:
        return [(_index(ops[0]) + part, _word(ops[1], part)) for part in (0, 1)]
    return [(_index(ops[0]), f"{_word(ops[1])}")]


@_means("R2UR")
def _r2ur(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    ops = [o for o in ops if not _is_predicate(o)]
    return [(_index(ops[0]), _word(ops[1]))]


@_means("IMAD")
def _imad(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, carries = _outputs(ops)
    a, b, c, *carry_in = ops
    if "WIDE" in mods or "HI" in mods:
        sign = "" if "U32" in mods else "_sgn"
        value = f"({sign}({_word(a)}) * {sign}({_word(b)}) + {_pair(c)})"
        if carry_in or (sign and any(n >= 0 for n in carries)):
            raise _Unknown("carry")
        found = [(n, f"{value} >> 64 & 1") for n in carries]
        if "HI" in mods:
            return [(register, f"{value} >> 32 & M"), *found]
        parts = [(register, f"{value} & M"), (register + 1, f"{value} >> 32 & M")]
        return found + parts if register >= 0 else found
    value = f"{_word(a)} * {_word(b)} + {_word(c)}"
    if "X" in mods:
        value += f" + {_predicate(carry_in[0])}"
    if any(n >= 0 for n in carries):
        raise _Unknown("carry")
    return [(register, f"({value}) & M")]


@_means("IADD3", "IADD", "VIADD")
def _iadd3(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, carries = _outputs(ops)
    carry_in = [o for o in ops if _is_predicate(o)]
    terms = [o for o in ops if not _is_predicate(o)]
    if "64" in mods:
        value = " + ".join(map(_pair, terms))
        return [(register, f"({value}) & M"), (register + 1, f"({value}) >> 32 & M")] if register >= 0 else []
    value = " + ".join([_word(t, carry=True) for t in terms] + [_predicate(p) for p in carry_in])
    found = [(register, f"({value}) & M")]
    found += [(n, f"int(({value}) >> 32 > {order})") for order, n in enumerate(carries)]
    return found


@_means("LEA")
def _lea(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, carries = _outputs(ops)
    carry_in = f" + {_predicate(ops.pop())}" if "X" in mods else ""
    if "HI" in mods:
        if "SX32" in mods:
            a, b, amount = ops
            wide = f"_sgn({_word(a)})"
        else:
            a, b, c, amount = ops
            wide = f"({_word(a)} | {_word(c)} << 32)"
        value = f"((({wide} << {_word(amount)}) >> 32 & M) + {_word(b, carry=True)}{carry_in})"
    else:
        a, b, amount = ops
        value = f"(({_word(a)} << {_word(amount)} & M) + {_word(b, carry=True)}{carry_in})"
    return [(register, f"{value} & M"), *((n, f"int({value} >> 32 > {order})") for order, n in enumerate(carries))]


@_means("SHF")
def _shf(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, low, amount, high = ops
    return [(_index(register), f"_shift({tuple(mods)!r}, {_word(low)}, {_word(amount)}, {_word(high)})")]


@_means("LOP3")
def _lop3(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    predicate = _index(ops.pop(0)) if _is_predicate(ops[0]) else -1
    register, a, b, c, table, *_ = ops
    value = f"_lut({_word(a)}, {_word(b)}, {_word(c)}, {_word(table)})"
    return [(_index(register), value), (predicate, f"int({value} != 0)")]


@_means("PLOP3")
def _plop3(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    first, second, a, b, c, table, other = ops
    arguments = f"{_predicate(a)}, {_predicate(b)}, {_predicate(c)}"
    return [
        (_index(first), f"_plut({arguments}, {_word(table)})"),
        (_index(second), f"_plut({arguments}, {_word(other)})"),
    ]


@_means("ISETP")
def _isetp(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    first, second, a, b, *predicates = ops
    name, combine = mods[0], next(m for m in mods if m in ("AND", "OR", "XOR"))
    read = _pair if "U64" in mods or "S64" in mods else _word
    signed = "" if "U32" in mods or "U64" in mods else "_sgn64" if "S64" in mods else "_sgn"
    lower = f", {_predicate(predicates[1])} + 0" if "EX" in mods else ""
    verdict = f"_compare({name!r}, {signed}({read(a)}) + 0, {signed}({read(b)}) + 0{lower})"
    # A comparison of unknowns may still be decided by the predicate it is combined with.
    other = _predicate(predicates[0])
    decisive = {"AND": "0", "OR": "1"}.get(combine)
    join = f"_{combine.lower()}"

    def result(value: str) -> str:
        if decisive is None or other in ("1", "_not(1)"):
            return f"{join}({value}, {other})"
        return f"({decisive} if {other} == {decisive} else {join}({value}, {other}))"

    return [(_index(first), result(verdict)), (_index(second), result(f"_not({verdict})"))]


@_means("SEL", "FSEL")
def _sel(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, a, b, predicate = ops
    if any(o[0] in "-|~" for o in (a, b)):  # of a float
        raise _Unknown("sign")
    return [(_index(register), f"({_word(b)}, {_word(a)})[{_predicate(predicate)}]")]


@_means("IABS")
def _iabs(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    return [(_index(ops[0]), f"abs(_sgn({_word(ops[1])}))")]


@_means("IMNMX", "VIMNMX")
def _imnmx(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    predicates = [o for o in ops if _is_predicate(o)]
    register, a, b = (o for o in ops if not _is_predicate(o))
    key = "" if "U32" in mods else ", key=_sgn"
    a, b = _word(a), _word(b)
    return [
        (_index(register), f"(max({a} + 0, {b} + 0{key}), min({a} + 0, {b} + 0{key}))[{_predicate(predicates[-1])}]")
    ]


@_means("VIADDMNMX")
def _viaddmnmx(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, a, b, bound, predicate = ops
    key = "" if "U32" in mods else ", key=_sgn"
    total, bound = f"(({_word(a)} + {_word(b)}) & {2**32 - 1})", _word(bound)
    return [
        (_index(register), f"(max({total}, {bound} + 0{key}), min({total}, {bound} + 0{key}))[{_predicate(predicate)}]")
    ]


@_means("PRMT")
def _prmt(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if mods:
        raise _Unknown(".".join(mods))
    register, a, selector, b = ops
    return [(_index(register), f"_permute({_word(a)}, {_word(selector)}, {_word(b)})")]


@_means("SGXT")
def _sgxt(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, a, bits = ops
    low = f"({_word(a)} & (1 << {_word(bits)}) - 1)"
    if "U32" not in mods:
        low = f"(({low} ^ 1 << {_word(bits)} - 1) - (1 << {_word(bits)} - 1) & M)"
    return [(_index(register), low)]


@_means("POPC")
def _popc(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    return [(_index(ops[0]), f"({_word(ops[1])} + 0).bit_count()")]


@_means("I2F", "I2FP")
def _i2f(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if {"F64", "F16", "BF16", "S8", "U8", "U16", "S16"} & set(mods):
        raise _Unknown(".".join(mods))
    value = _pair(ops[1]) if "U64" in mods or "S64" in mods else _word(ops[1])
    if not any(m.startswith("U") for m in mods):
        value = f"{'_sgn64' if 'S64' in mods else '_sgn'}({value})"
    return [(_index(ops[0]), f"_to_float({value} + 0, {'RP' in mods})")]


@_means("F2I")
def _f2i(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register = _index(ops[0])
    if "TRUNC" not in mods or not any(m.startswith("U") for m in mods) or "F64" in mods:
        raise _Unknown(".".join(mods))
    if "U64" in mods:
        value = f"_from_float({_word(ops[1])} + 0, 0xFFFFFFFFFFFFFFFF)"
        return [(register, f"{value} & M"), (register + 1, f"{value} >> 32")]
    return [(register, f"_from_float({_word(ops[1])} + 0, M)")]


@_means("MUFU")
def _mufu(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if mods != ("RCP",):
        raise _Unknown(".".join(mods))
    return [(_index(ops[0]), f"_reciprocal({_word(ops[1])} + 0)")]


@_means("HFMA2")
def _hfma2(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if len(ops) != 5 or ops[1:3] != ["-RZ", "RZ"]:  # the idiom that loads a constant
        raise _Unknown("arithmetic")
    return [(_index(ops[0]), str(_halves(ops[3], ops[4])))]


@_means("S2R", "S2UR", "CS2R")
def _s2r(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, name = _index(ops[0]), ops[1]
    if name == "SRZ":
        return [(register, "0")] + ([] if "32" in mods else [(register + 1, "0")])
    specials.add(name)
    return [(register, f"s.special.get({name!r})")]


@_means("LDC")
def _ldc(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register = _index(ops[0])
    words = 4 if "128" in mods else 2 if "64" in mods else 1
    found = [(register + n, _word(ops[1], n)) for n in range(words)]
    for name, mask in (("U8", 0xFF), ("U16", 0xFFFF)):
        if name in mods:
            (offset,) = re.findall(r"\[(0x[0-9a-f]+)\]$", ops[1])
            at = int(offset, 16)
            return [(register, f"k.get({at & ~3}) >> {8 * (at & 3)} & {mask}")]
    if "S8" in mods or "S16" in mods:
        raise _Unknown(".".join(mods))
    return found


@_means("P2R")
def _p2r(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    register, _, a, mask = ops
    shift = 8 * int(mods[0][1]) if mods and re.fullmatch(r"B\d", mods[0]) else 0
    chosen = int(mask, 16)
    bits = " | ".join(f"r[{_PREDICATE + n}] << {n + shift}" for n in range(7) if chosen >> n & 1) or "0"
    return [(_index(register), f"{_word(a)} & {MASK ^ chosen << shift} | {bits}")]


@_means("R2P")
def _r2p(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    _, a, mask = ops
    name, _, byte = a.partition(".B")
    shift = 8 * int(byte) if byte else 0
    return [(_PREDICATE + n, f"{_word(name)} >> {n + shift} & 1") for n in range(7) if int(mask, 16) >> n & 1]


@_means("ELECT")
def _elect(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    specials.add("lane")
    return [(_index(ops[0]), "int(s.special['lane'] == 0)")]


@_means("VOTE", "VOTEU")
def _vote(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if not _is_predicate(ops[0]):
        raise _Unknown("ballot")
    return [(_index(ops[0]), f"{_predicate(ops[-1])}")]


@_means("SHFL")
def _shfl(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    predicate, register, value, lane, _ = ops
    if "IDX" not in mods or not re.fullmatch(r"RZ|0x[0-9a-f]+", lane):
        raise _Unknown("shuffle")
    return [(_index(register), _word(value)), (_index(predicate), "1")]


@_means("SYNCS")
def _syncs(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    return [(_index(ops[0]), "1")]  # what was waited for is there


@_means("UTCATOMSWS")
def _utcatomsws(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    if "FIND_AND_SET" not in mods:
        return []
    # Tensor memory is free when a kernel asks for it. Its address does not matter here.
    return [(_index(ops[0]), "1"), (_index(ops[1]), "None")]


def _local_address(token: str) -> str:
    found = re.fullmatch(r"\[(R\d+)?\+?(-?0x[0-9a-f]+)?\]", token)
    if found is None:
        raise _Unknown(token)
    return f"({f'r[{_index(found[1])}] + ' if found[1] else ''}{int(found[2] or '0x0', 16)} & M)"


@_means("STL")
def _stl(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    words = 4 if "128" in mods else 2 if "64" in mods else 1
    values = ", ".join(f"{_local_address(ops[0])} + {4 * n}: {_word(ops[1], n)}" for n in range(words))
    return [(_LOCAL, f"r[{_LOCAL}] | {{{values}}}")]


@_means("LDL")
def _ldl(mods: Sequence[str], ops: list[str], specials: set[str]) -> Assignments:
    words = 4 if "128" in mods else 2 if "64" in mods else 1
    address = _local_address(ops[1])
    return [(_index(ops[0]) + n, f"r[{_LOCAL}].get({address} + {4 * n})") for n in range(words)]
