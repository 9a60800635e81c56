"""What is used again and again stays in DDR while others pass through: no copy goes up and down by turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from holdfast.kvstore.config import Config
from holdfast.kvstore.service import NS, Service

from fakes import EXTENT_BYTES, tiny_config
from scene import SPEC, Scene, secret, tokens

HOT = 3
COLD = 12
ROUNDS = 16
LEARNT = 9  # rounds after which the policy knows them apart


class Governed(Scene):
    """DDR for ten extents, under a policy; everything is on NVMe too."""

    def __init__(self, policy, marks=(1, 1)):
        super().__init__(ddr=10, nvme=64, ddr_marks=marks)
        self.config: Config = replace(self.config, eviction=replace(tiny_config().eviction, policy=policy))
        self.service = Service(self.config, self.clock, self.effects, secret)
        self.service.register_spec(SPEC)
        self.settle()

    def use(self, document):
        """Extents that had to be moved for one question on it."""
        self.clock.advance(NS)
        heard = self.attach(document)
        self.settle()
        moved_bytes = self.state.ledger.swaps[-1].moved_bytes
        self.detach(heard[0])
        self.service.tick()
        self.settle()
        return moved_bytes // EXTENT_BYTES


def moved_by_round(scene, colds):
    """Extents of the hot documents that each round had to move, with so many others in between."""
    hot = [scene.store(f"hot-{number}", tokens(number + 1, 2)) for number in range(HOT)]
    cold = [scene.store(f"cold-{number}", tokens(number + 50, 2)) for number in range(COLD)]
    found, count = [], 0
    for _ in range(ROUNDS):
        found.append(sum(scene.use(document) for document in hot))
        for _ in range(colds):
            scene.use(cold[count % COLD])
            count += 1
    return found


@pytest.mark.parametrize(("colds", "marks"), [(2, (0.9, 0.8)), (3, (1, 1)), (4, (1, 1))])
def test_what_passes_through_does_not_displace_what_comes_back(colds, marks):
    assert moved_by_round(Governed("popularity", marks), colds)[LEARNT:] == [0] * (ROUNDS - LEARNT)


def test_under_lru_it_would():
    assert moved_by_round(Governed("lru"), 3)[LEARNT:] == [2 * HOT] * (ROUNDS - LEARNT)


def test_a_mark_is_left_alone_until_it_is_passed_again():
    """Between the marks nothing leaves: what is brought back does not push the next one out at once."""
    scene = Governed("popularity", (0.9, 0.5))
    documents = [scene.store(f"d{number}", tokens(number + 1, 1)) for number in range(10)]
    scene.service.tick()
    scene.settle()
    assert scene.state.ledger.counts["watermark_ddr"] == 5
    gone = [document for document in documents if len(scene.tiers(document)[0]) == 1]
    for document in gone[:4]:
        assert scene.use(document) == 1
    assert scene.state.ledger.counts["watermark_ddr"] == 5
