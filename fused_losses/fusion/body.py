"""What runs along lanes: loops over a block, cut where a function takes the block as a whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

words_of = re.compile(r"[A-Za-z_]\w*").findall
# Heads of a loop over a block's lanes: rounded up to whole vectors, and its own alone.
LANES = "FL_ELEMENTWISE", "for (int64_t i = 0, count = whole(n); i < count; ++i) {"
EXACT_LANES = "FL_ELEMENTWISE", "for (int64_t i = 0; i < n; ++i) {"


@dataclass
class Statement:
    """What is done for each lane, or by one call for a block of them."""

    text: str
    defines: str = ""  # the name of what each lane has, or the array of what a block has
    is_call: bool = False
    may_repeat: bool = True  # or must, as often as the loops around the lanes say
    is_exact: bool = False  # it must not be done beyond the block's own lanes

    def __post_init__(self) -> None:
        self.words: list[str] = words_of(self.text)


@dataclass(eq=False)  # compared by identity
class Phase:
    """A loop over the lanes of a block, then the calls that wait for it."""

    lanes: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)  # what lanes have in the loop
    is_exact: bool = False

    def lines(self) -> Iterator[str]:
        if self.lanes:
            yield from (*(LANES if not self.is_exact else EXACT_LANES), *self.lanes, "}")
        yield from self.calls


class Body:
    """Statements in order; ``new_array(kind)`` names a new array of a block's length."""

    def __init__(self, new_array: Callable[[str], str]) -> None:
        self._new_array = new_array
        self._statements: list[Statement] = []
        self._kinds: dict[str, str] = {}  # of what differs from lane to lane, its C++ type
        self._definitions: dict[str, Statement] = {}
        self._arrays: dict[str, str] = {}  # of a value, the array that has it
        self._kept: set[str] = set()  # arrays that others read

    def __contains__(self, name: str) -> bool:
        """Whether a value differs from lane to lane."""
        return name in self._kinds

    def vary(self, names: Iterable[str]) -> bool:
        """Whether any of these values does."""
        return not self._kinds.keys().isdisjoint(names)

    def define(self, kind: str, name: str, text: str) -> None:
        self._kinds[name] = kind
        self._definitions[name] = Statement(f"const {kind} {name} = {text};", name)
        self._statements.append(self._definitions[name])

    def load(self, kind: str, name: str, array: str) -> None:
        self._arrays[name] = array
        self.define(kind, name, f"{array}[i]")

    def store(self, text: str, is_exact: bool = False) -> None:
        self._statements.append(Statement(text, may_repeat=False, is_exact=is_exact))

    def note(self, text: str) -> None:
        """A store that has the same effect however often it is done to a lane."""
        self._statements.append(Statement(text, is_exact=True))

    def call(self, kind: str, name: str, function: str, arguments: Sequence[tuple[str, str]]) -> None:
        """Defines what a function of a block gives for its arguments: values, each with its C++ type."""
        given = [self._array_of(value, of) if value in self else value for value, of in arguments]
        array = self._new_array(kind)
        self._statements.append(Statement(f"{function}({', '.join(given)}, n, {array});", array, is_call=True))
        self.load(kind, name, array)

    def block_of(self, value: str, kind: str) -> str:
        """The array of a value, for those who read it once the body has run."""
        array = self._array_of(value, kind)
        self._kept.add(array)
        return array

    def _array_of(self, value: str, kind: str) -> str:
        if value not in self._arrays:
            self._arrays[value] = array = self._new_array(kind)
            self._statements.append(Statement(f"{array}[i] = {value};", array))
        return self._arrays[value]

    def lines(self, changing: set[str]) -> tuple[list[str], list[str]]:
        """What comes before the loops around the lanes, along which some names change, and what within."""
        steady, inner = [], []
        for statement in self._used():
            if changing and not (statement.may_repeat and changing.isdisjoint(statement.words)):
                changing.add(statement.defines)
                inner.append(statement)
            else:
                steady.append(statement)
        home: dict[str, Phase] = {}  # of a value or an array, the phase that has it first
        before, within = self._phases(steady, home), self._phases(inner, home)
        return [line for phase in before for line in phase.lines()], [line for p in within for line in p.lines()]

    def _phases(self, statements: Sequence[Statement], home: dict[str, Phase]) -> list[Phase]:
        """Statements, each in the first phase that it can be in."""
        phases = [Phase()]
        places = {phases[0]: 0}
        for statement in statements:
            homes = [home[name] for name in statement.words if name in home]
            at = max([places[other] for other in homes if other in places], default=0)
            phase = phases[at]
            if statement.is_call:
                if phase is phases[-1]:
                    phases.append(Phase())
                    places[phases[-1]] = at + 1
                phase.calls.append(statement.text)
                home[statement.defines] = phases[at + 1]
                continue
            self._bring(statement, phase, home)
            phase.lanes.append(statement.text)
            phase.is_exact |= statement.is_exact
            phase.known.add(statement.defines)
            home[statement.defines] = phase
        return phases

    def _bring(self, statement: Statement, phase: Phase, home: Mapping[str, Phase]) -> None:
        """Lets a phase have what a statement takes of earlier ones."""
        for name in statement.words:
            if name not in home or name not in self._kinds or name in phase.known:
                continue
            phase.known.add(name)
            kind = self._kinds[name]
            if kind == "bool":  # truth values in memory would keep lanes of eight bytes from being vectorised
                self._bring(self._definitions[name], phase, home)
                phase.lanes.append(self._definitions[name].text)
            else:
                if name not in self._arrays:
                    self._arrays[name] = self._new_array(kind)
                    home[name].lanes.append(f"{self._arrays[name]}[i] = {name};")
                phase.lanes.append(f"const {kind} {name} = {self._arrays[name]}[i];")

    def _used(self) -> list[Statement]:
        """Statements that store, and what they take."""
        kept: list[Statement] = []
        used = set(self._kept)
        for statement in reversed(self._statements):
            if not statement.defines or statement.defines in used:
                kept.append(statement)
                used.update(statement.words)
            else:
                self._arrays = {name: array for name, array in self._arrays.items() if array != statement.defines}
        return kept[::-1]
