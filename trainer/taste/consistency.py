"""What in a person's choices no head could learn: contradictions, cycles, and a liking for one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .comparisons import Gathered
from .estimate import Estimate, wilson
from .folds import plain


@dataclass(frozen=True)
class Consistency:
    """Figures of one or more people's choices."""

    repeated: int
    """Pairs that one person judged more than once, and of those judgements the share that is the pair's usual one."""
    same: float | None
    cycles: int
    """Choices that lie on a cycle (A over B, B over C, C over A) of one person and prompt, contradictions of one pair not counted."""
    first: Estimate | None
    """Share of choices between two that fell on the image shown first, with Wilson's 95 % interval; None without such choices."""
    alone: int
    thumbs: int

    @property
    def warnings(self) -> list[str]:
        """One line each."""
        found: list[str] = []
        if self.same is not None and self.same < 0.75:
            found.append(f"{self.repeated} pairs were judged more than once, with the same answer in {self.same:.0%} only")
        if self.cycles:
            found.append(
                f"{self.cycles} choices run in circles (A over B over C over A): at least one of each circle contradicts the others"
            )
        if self.first is not None and not self.first.low <= 0.5 <= self.first.high:
            found.append(f"the image shown first was chosen in {self.first} of the choices between two: a side is preferred, not an image")
        if self.alone:
            found.append(
                f"{self.alone} of {self.thumbs} likes and dislikes are left out: under their prompts all images are liked or all disliked, "
                "which says something of the prompt alone"
            )
        return found


def consistency(found: Gathered) -> Consistency:
    """Of all people together."""
    edges: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for one in found.comparisons:
        if not one.tie:
            edges.setdefault((one.person, plain(one.prompt)), Counter())[one.better.sha256, one.worse.sha256] += 1
    repeated = agreed = judged = cycles = 0
    for counted in edges.values():
        usual: list[tuple[str, str]] = []
        for (better, worse), number in counted.items():
            other = counted.get((worse, better), 0)
            if number > other:
                usual.append((better, worse))
            if number + other > 1 and (better < worse or not other):
                repeated, agreed, judged = repeated + 1, agreed + max(number, other), judged + number + other
        cycles += _on_cycles(usual)
    two = [place for place, number, _ in found.places if number == 2]
    first = wilson(two.count(0) / len(two), len(two)) if two else None
    return Consistency(repeated, agreed / judged if judged else None, cycles, first, found.alone.total(), found.thumbs.total())


def _on_cycles(edges: Sequence[tuple[str, str]]) -> int:
    """The number of edges inside strongly connected components, by Kosaraju's two passes."""
    after: dict[str, list[str]] = {}
    before: dict[str, list[str]] = {}
    for a, b in edges:
        after.setdefault(a, []).append(b)
        before.setdefault(b, []).append(a)
    order: list[str] = []
    seen: set[str] = set()
    for start in [*after]:
        stack = [(start, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(other, False) for other in after.get(node, [])]
    component: dict[str, int] = {}
    for number, start in enumerate(reversed(order)):
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node not in component:
                component[node] = number
                waiting += [other for other in before.get(node, []) if other not in component]
    return sum(component[a] == component[b] for a, b in edges)
