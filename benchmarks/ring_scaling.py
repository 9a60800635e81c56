"""Groups of 1, 2 and 4 ranks beside each other: CPU-seconds of the same attention, and the memory of a rank.

More ranks than cores: the wall clock says nothing of them, the CPU time of all ranks together does.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from curves import Curve
from ring_case import CHOSEN, Case
from ring_group import Group, interleave, load, ranks_group
from ring_rows import Sizes
from samples import Samples

MIB: Final = 1 << 20
MEMORY_NEW: Final = 64


class Scaling:
    """`speed`: CPU-seconds over those of one rank. `memory`: MiB of a rank over document tokens."""

    def __init__(self, pair: Group, scratch: Path, sizes: Sizes) -> None:
        self.pair, self.scratch, self.sizes = pair, scratch, sizes
        self.speed: list[Curve] = []
        self.memory: list[Curve] = []

    def run(self) -> None:
        with ExitStack() as stack:
            groups = {
                size: self.pair
                if size == self.pair.size
                else stack.enter_context(ranks_group(size, self.scratch / f"ranks{size}"))
                for size in self.sizes.ranks
            }
            self.cpu_seconds(groups)
            self.bytes_of_a_rank(groups)

    def cpu_seconds(self, groups: dict[int, Group]) -> None:
        wanted = [
            (Case("scaled_full", self.sizes.full[0]), "pass_kv", f"full prefill of {self.sizes.full[0]:,}, pass-KV"),
            (Case("scaled_q", self.sizes.new[1], self.sizes.cached), "pass_q", f"{self.sizes.new[1]} new, pass-Q"),
            (Case("scaled_kv", self.sizes.new[1], self.sizes.cached), "pass_kv", f"{self.sizes.new[1]} new, pass-KV"),
        ]
        for case, how, title in wanted:
            load(list(groups.values()), [case])
            samples = Samples()
            sides = {
                str(size): partial(group.sample, 1, "run", name=case.name, how=how, over=CHOSEN)
                for size, group in groups.items()
            }
            interleave(Samples(), 1, sides)
            interleave(samples, self.sizes.few_rounds, sides)
            one = samples.ms("1_cpu")
            points = tuple((float(size), samples.ms(f"{size}_cpu") / one) for size in groups)
            self.speed.append(Curve(title, points))
            for group in groups.values():
                group.ask("forget")

    def bytes_of_a_rank(self, groups: dict[int, Group]) -> None:
        """The fullest rank's, by pass-KV, which needs more than pass-Q: messages of one layer."""
        for size, group in groups.items():
            kept: list[tuple[float, float]] = []
            peaks: list[tuple[float, float]] = []
            for tokens in self.sizes.memory_tokens:
                layers = self.sizes.memory_layers
                answers = group.ask("memory", cached=tokens, new=MEMORY_NEW, layers=layers, over=CHOSEN)
                for points, what in ((kept, "kv_bytes"), (peaks, "peak_bytes")):
                    points.append((tokens, max(answer[what] for answer in answers) / MIB))
            ranks = f"{size} rank" + ("s" if size > 1 else "")
            self.memory.append(Curve(f"{ranks}: KV", tuple(kept), dashed=True))
            self.memory.append(Curve(f"{ranks}: peak RSS", tuple(peaks)))
