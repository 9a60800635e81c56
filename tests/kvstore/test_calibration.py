"""Calibration: what is measured, what is told, what predictions make of it."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from holdfast.kvstore.arena import Arena
from holdfast.kvstore.calibration import Calibration, Gpu, Rate
from holdfast.kvstore.catalog import Catalog
from holdfast.kvstore.clock import SystemClock
from holdfast.kvstore.errors import InvalidRequest, MalformedFrame, StorageFailed, Unavailable
from holdfast.kvstore.frames import LENGTH, Envelope, decode_request, encode
from holdfast.kvstore.gpus import gpus
from holdfast.kvstore.ledger import Hop, Ledger, SwapRecord
from holdfast.kvstore.measure import SLAB_BYTES, measure
from holdfast.kvstore.measurements import RINGS_KEPT, Measured
from holdfast.kvstore.orders import PutCalibration, PutRings, Write
from holdfast.kvstore.residency import Tier
from holdfast.kvstore.segments import SystemIo
from holdfast.kvstore.wire import KeepRing
from hypothesis import given
from hypothesis import strategies as st

from fakes import RING_SETTING, RING_SPEED, ingest, ring, tiny_service

READ, LOAD = Hop(Tier.NVME, Tier.DDR), Hop(Tier.DDR, Tier.HBM)


def rate(name, speed=1e9, latency_ns=1000):
    return Rate(
        name=name,
        size_bytes=1 << 20,
        rounds=3,
        bytes_per_second=speed,
        slowest=speed / 2,
        fastest=speed * 2,
        latency_ns=latency_ns,
    )


def calibration(*rates):
    return Calibration(
        measured_wall_ns=5,
        machine="a box",
        rates=rates or (rate("ddr"), rate("nvme->ddr", 2e9), rate("ddr->hbm", 4e9)),
        gpus=(Gpu(index=0, name="one", hbm_bytes=80 << 30),),
        unknown=("hbm->ddr: nobody asked",),
    )


# The service ---------------------------------------------------------------------------------------


def test_predictions_follow_a_calibration_and_hops_it_does_not_name_stay():
    service, effects, _ = tiny_service()
    before = dict(service.planner.links)
    service.measurements.calibrate(calibration(), print)
    assert service.planner.links[READ].bytes_per_second == 2e9
    assert service.planner.links[LOAD].latency_ns == 1000
    untouched = [hop for hop in before if hop not in (READ, LOAD)]
    assert all(service.planner.links[hop] == before[hop] for hop in untouched)
    written = [order for order in effects.orders if isinstance(order, Write)]
    assert written[-1].records == (PutCalibration(calibration()),)


def test_whoever_calibrates_hears_when_it_is_kept_or_not():
    service, effects, _ = tiny_service()
    heard = []
    service.measurements.calibrate(calibration(), heard.append)
    service.measurements.calibrate(calibration(), heard.append)
    assert heard == []
    refused = StorageFailed("full")
    effects.complete(service, effects.orders[0])
    effects.fail(service, effects.orders[0], refused)
    assert heard == [None, refused]


def test_a_calibration_survives_a_restart(tmp_path):
    catalog = Catalog(tmp_path / "catalog")
    catalog.commit([PutCalibration(calibration(rate("nvme->ddr"))), PutCalibration(calibration())])
    contents = catalog.load()
    assert contents.calibration == catalog.measured()[0] == calibration()
    service, _, _ = tiny_service()
    service.restore((), (), (), (), Measured(calibration=contents.calibration))
    assert service.planner.calibration == calibration()
    assert service.planner.links[READ].bytes_per_second == 2e9
    catalog.close()


@pytest.mark.parametrize("bad", [rate("ddr->nvme", 1e-310), rate("ddr->nvme", -1.0), rate("ddr", 1e9, -1)])
def test_a_rate_that_cannot_be_is_refused_and_changes_nothing(bad):
    service, effects, _ = tiny_service()
    before = dict(service.planner.links)
    with pytest.raises(InvalidRequest):
        service.measurements.calibrate(calibration(bad), print)
    assert service.planner.links == before
    assert not effects.orders


# Groups -------------------------------------------------------------------------------------------


def test_a_group_finds_what_was_measured_in_its_own_setting_only():
    service, effects, _ = tiny_service()
    heard = []
    service.measurements.keep_ring(ring(1), heard.append)
    service.measurements.keep_ring(ring(2), heard.append)
    assert service.measurements.ring(RING_SETTING) == ring(2)
    for differs in ({"cp": 4}, {"kernel": "flex"}, {"machine": "another"}, {"dtype": "float16"}, {"tp": 2}):
        assert service.measurements.ring(replace(RING_SETTING, **differs)) is None
    assert heard == []
    effects.complete_all(service)
    assert heard == [None, None]
    service.measurements.keep_ring(ring(cp=4), heard.append)
    service.measurements.keep_ring(ring(3), heard.append)
    assert service.measurements.rings() == [ring(3), ring(cp=4)]


def test_of_groups_so_many_settings_are_kept_the_newest():
    service, effects, _ = tiny_service()
    for cp in range(1, RINGS_KEPT + 2):
        service.measurements.keep_ring(ring(cp=cp), lambda _: None)
    kept = service.measurements.rings()
    assert [rate.setting.cp for rate in kept] == list(range(RINGS_KEPT + 1, 1, -1))
    assert effects.orders[-1].records == (PutRings(tuple(reversed(kept))),)


def test_what_groups_were_measured_to_do_survives_a_restart(tmp_path):
    catalog = Catalog(tmp_path / "catalog")
    assert catalog.load().rings == ()
    catalog.commit([PutRings((ring(cp=4),)), PutRings((ring(), ring(cp=4)))])
    contents = catalog.load()
    catalog.close()
    service, _, _ = tiny_service()
    service.restore((), (), (), (), Measured(rings=contents.rings))
    assert service.measurements.rings() == [ring(cp=4), ring()]


def test_measurements_that_are_not_ours_are_a_clear_error(tmp_path):
    """Whoever reads them: the daemon at its start, or `holdfast calibrate --show` without one."""
    catalog = Catalog(tmp_path / "catalog")
    catalog.commit([PutRings((ring(),))])
    catalog._database.execute("UPDATE meta SET value = '[{}]' WHERE name = 'rings'")
    for read in (catalog.load, catalog.measured):
        with pytest.raises(StorageFailed, match="a row that is not ours"):
            read()
    catalog.close()


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("flops_per_second", 0.0),
        ("bytes_per_second", -1.0),
        ("copy_bytes_per_second", math.nan),
        ("key_bytes_per_second", math.inf),
        ("overlap", 1.5),
        ("overlap", math.nan),
        ("latency_ns", -1.0),
        ("spread", math.inf),
    ],
)
def test_a_ring_that_cannot_be_is_malformed(field, bad):
    frame = encode(Envelope(1, KeepRing(replace(ring(), speed=replace(RING_SPEED, **{field: bad})))))
    with pytest.raises(MalformedFrame):
        decode_request(frame[LENGTH.size :])
    good = Envelope(1, KeepRing(ring()))
    assert decode_request(encode(good)[LENGTH.size :]) == good


def test_a_hop_exposes_what_computing_does_not_hide():
    hop = 1e-3
    size = (hop - RING_SPEED.latency_ns / 1e9) * RING_SPEED.bytes_per_second
    hidden = replace(RING_SPEED, overlap=1.0)
    assert RING_SPEED.shift_seconds(size) == pytest.approx(hop)
    assert RING_SPEED.shift_seconds(0) == 0
    assert replace(RING_SPEED, overlap=0.0).exposed_seconds(size, 5.0) == pytest.approx(hop)
    assert hidden.exposed_seconds(size, 0.0004) == pytest.approx(0.0006)
    assert hidden.exposed_seconds(size, 5.0) == pytest.approx(0, abs=1e-12)


# Predictions ---------------------------------------------------------------------------------------


def test_of_overlapping_hops_the_slowest_counts_whole_and_of_others_one_move():
    service, _, _ = tiny_service()
    service.measurements.calibrate(calibration(rate("nvme->ddr", 1e9, 10), rate("ddr->hbm", 4e9, 20)), print)
    assert service.planner.predicted_ns({}, 100) == 0
    assert service.planner.predicted_ns({READ: 0}, 100) == 0
    assert service.planner.predicted_ns({READ: 1000}, 100) == 1010
    assert service.planner.predicted_ns({READ: 1000, LOAD: 1000}, 100) == 1010 + 20 + 25


@given(sizes=st.lists(st.integers(1, 10**12), min_size=2, max_size=2), move=st.integers(1, 10**9))
def test_a_prediction_lies_between_the_slowest_hop_and_the_sum(sizes, move):
    service, _, _ = tiny_service()
    planner = service.planner
    wanted = dict(zip((READ, LOAD), sizes, strict=True))
    alone = [planner.predicted_ns({hop: size}, move) for hop, size in wanted.items()]
    assert max(alone) <= planner.predicted_ns(wanted, move) <= sum(alone)


def test_an_attach_is_predicted_by_what_moves_and_teaches_the_link():
    service, effects, clock = tiny_service()
    document = ingest(service, effects, "report")
    service.evict(document, Tier.DDR, 0, 10**18, lambda _: None)
    effects.complete_all(service)
    before = service.planner.links[READ]
    attach = service.attach(1, document, None, None, None, 10**18, lambda _: None)
    assert attach.loading.swap.predicted_ns == before.move_ns(4 * (16 << 10))
    clock.advance(10**9)
    effects.complete_all(service)
    assert service.planner.links[READ].move_count == before.move_count + 1  # a load, not each of its extents
    assert service.planner.links[READ].bytes_per_second < before.bytes_per_second
    service.detach(1, attach.lease.id)
    again = service.attach(1, document, None, None, None, 10**18, lambda _: None)
    assert again.loading.swap.predicted_ns == 0


def test_errors_of_predictions_are_relative_ascending_and_leave_waits_out():
    ledger = Ledger(10)

    def swap(predicted_ns, reattach_ns, wait_ns=0, outcome="ready"):
        ledger.swaps.append(
            SwapRecord(
                id=1,
                document="d",
                group=None,
                client=1,
                started_wall_ns=0,
                token_count=1,
                predicted_ns=predicted_ns,
                reattach_ns=reattach_ns,
                wait_ns=wait_ns,
                outcome=outcome,
            )
        )

    assert ledger.prediction_errors() == []
    assert ledger.prediction_quantiles() == {}
    swap(100, 200)
    swap(100, 300, wait_ns=200)
    swap(0, 5)  # nothing moved
    swap(100, None, outcome="moving")
    swap(300, 200)
    assert ledger.prediction_errors() == [0.0, 0.5, 0.5]
    assert ledger.prediction_quantiles() == {0.5: 0.5, 0.9: 0.5}


# Measuring -----------------------------------------------------------------------------------------


@pytest.fixture
def arena(tmp_path):
    arena = Arena(tmp_path / "slabs", SLAB_BYTES)
    arena.keep(())
    yield arena
    arena.close()


def test_every_tier_and_hop_is_measured_with_its_spread(arena, tmp_path):
    steps = []
    rates = measure(arena, tmp_path / "nvme", SystemClock(), 2, 2, steps.append)
    assert [found.name for found in rates] == ["ddr", "ddr->nvme", "nvme->ddr"]
    for found in rates:
        assert 0 < found.slowest <= found.bytes_per_second <= found.fastest
        assert found.latency_ns > 0
        assert found.rounds == 2
    assert steps == ["warming up", "round 1 of 2", "round 2 of 2"]


def test_a_disk_that_fails_is_an_error_and_not_a_rate(arena, tmp_path, monkeypatch):
    def full(self, descriptor, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SystemIo, "pwrite", full)
    with pytest.raises(StorageFailed, match="No space left"):
        measure(arena, tmp_path / "nvme", SystemClock(), 2, 1, lambda _: None)


# GPUs ----------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


def driver(**answers):
    """A driver that has these answers, and says NVMLError to everything else."""

    def no(*_):
        raise NVMLError("not supported")

    names = (
        "nvmlDeviceGetName",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetNvLinkState",
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetMaxPcieLinkWidth",
    )
    known = {
        "NVMLError": NVMLError,
        "NVML_NVLINK_MAX_LINKS": 3,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
    }
    return SimpleNamespace(**known | dict.fromkeys(names, no) | answers)


def test_what_a_driver_does_not_tell_is_unknown_not_zero(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    assert gpus() == (Gpu(index=0, name="unknown"),)


def test_what_a_driver_tells_is_told(monkeypatch):
    memory = SimpleNamespace(total=80 << 30, free=70 << 30)
    states = [1, 0, 1]
    told = driver(
        nvmlDeviceGetName=lambda _: b"H200",
        nvmlDeviceGetMemoryInfo=lambda _: memory,
        nvmlDeviceGetNvLinkState=lambda _, link: states[link],
        nvmlDeviceGetMaxPcieLinkGeneration=lambda _: 5,
        nvmlDeviceGetMaxPcieLinkWidth=lambda _: 16,
    )
    monkeypatch.setitem(sys.modules, "pynvml", told)
    known = Gpu(index=0, name="H200", hbm_bytes=80 << 30, hbm_free_bytes=70 << 30)
    assert gpus() == (
        Gpu(
            index=0,
            name="H200",
            hbm_bytes=known.hbm_bytes,
            hbm_free_bytes=known.hbm_free_bytes,
            pcie_generation=5,
            pcie_width=16,
            nvlinks=2,
        ),
    )


def test_without_a_driver_or_the_library_the_reason_is_told(monkeypatch):
    def no_driver():
        raise NVMLError("Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", driver(nvmlInit=no_driver))
    with pytest.raises(Unavailable, match="no NVIDIA driver answers"):
        gpus()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Unavailable, match=r"holdfast\[gpu\]"):
        gpus()
