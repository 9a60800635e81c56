"""The classical policies under the contract, and what each does beyond it."""

from __future__ import annotations

from typing import ClassVar

import pytest
from holdfast.eviction.arc import Arc
from holdfast.eviction.belady import Belady
from holdfast.eviction.gdsf import Gdsf
from holdfast.eviction.lfu import Lfu
from holdfast.eviction.mq import Mq
from holdfast.eviction.policy import POLICIES
from holdfast.eviction.s3fifo import S3Fifo
from holdfast.eviction.tinylfu import TinyLfu

from contracts.policy import PolicyContract


class TestLfu(PolicyContract):
    make = Lfu


class TestArc(PolicyContract):
    make = Arc


class TestS3Fifo(PolicyContract):
    make = S3Fifo


class TestTinyLfu(PolicyContract):
    make = TinyLfu


class TestGdsf(PolicyContract):
    make = Gdsf


class TestMq(PolicyContract):
    make = Mq


class TestBelady(PolicyContract):
    make: ClassVar = Belady

    def policy_for(self, to_come):
        return Belady(to_come)

    def test_it_is_registered_under_its_name(self):
        assert "belady" not in POLICIES, "it would need the future"

    def test_memory_is_bounded(self):
        pytest.skip("it holds the future")
