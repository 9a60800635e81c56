"""Getting: opaque objects are leased, many with one message, and each is brought to DDR, or is a miss, by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .attach import Attach, Attaches
from .errors import ClaimNotFound, DeadlineExceeded, HoldfastError
from .expiry import Expiry
from .keeping import Keeping
from .opaque import object_id
from .putting import runs
from .state import DocumentRecord
from .uses import Attached


@dataclass(eq=False, slots=True, kw_only=True)
class Get:
    """A batch. By number in it: `found` are leased and in DDR, `refused` say why not; the rest is not there.

    `coming` are neither yet. `used` is how the use of them was told.
    """

    id: int
    client: int
    deadline_ns: int
    answered: Callable[[Get], None]
    coming: dict[int, Attach | None] = field(default_factory=dict)
    found: dict[int, Attach] = field(default_factory=dict)
    refused: dict[int, HoldfastError] = field(default_factory=dict)
    used: list[Attached] = field(default_factory=list)
    is_asked: bool = False  # for all


class Gets:
    """Begins and ends batches."""

    def __init__(self, attaches: Attaches, keeping: Keeping, expiry: Expiry) -> None:
        self.attaches = attaches
        self.keeping = keeping
        self.expiry = expiry
        self.store = keeping.store
        self.state = keeping.state
        self.uses = keeping.store.planner.uses
        self.open: dict[int, Get] = {}
        self._over: list[Attach] = []  # to be ended outside of what they were told in

    def begin(
        self,
        client: int,
        tenant: str,
        namespace: str,
        keys: Sequence[bytes],
        deadline_ns: int,
        answered: Callable[[Get], None],
    ) -> None:
        """Lease what is there. `answered` hears the batch when each object is in DDR, or will not be."""
        get = Get(id=self.store.new_id(), client=client, deadline_ns=deadline_ns, answered=answered)
        records: dict[int, DocumentRecord] = {}
        for number, key in enumerate(keys):
            try:
                document = object_id(tenant, namespace, key)
                self.expiry.refuse(document)
            except HoldfastError as error:
                get.refused[number] = error
                continue
            record = self.state.documents.get(document)
            if record is not None and self.state.extents[record.document.extents[0]].source() is not None:
                records[number] = record
        self.open[get.id] = get
        get.used = self.use(list(records.values()))
        for number, record in records.items():
            self._begin(get, number, record)
        get.is_asked = True
        self._answer(get)

    def use(self, records: Sequence[DocumentRecord]) -> list[Attached]:
        """Tell the policy that these are used, in this order."""
        extents = ((record.document, self.state.extents[record.document.extents[0]].extent) for record in records)
        told = [self.uses.objects(run) for run in runs(list(extents))]
        for record in records:
            self.uses.count(record)
            self.keeping.hit(record.document.id)
            self.keeping.upkeep.room.writes.came_back(record, "read again")
        return told

    def _begin(self, get: Get, number: int, record: DocumentRecord) -> None:
        def granted(result: Attach | HoldfastError) -> None:
            if number not in get.coming:
                return
            if isinstance(result, HoldfastError):
                self._refused(get, number, result)
            else:
                get.coming[number] = result
                self.attaches.wait(result, 1, lambda ready: here(result, ready))

        def here(attach: Attach, ready: int | HoldfastError) -> None:
            if number not in get.coming:
                return
            if isinstance(ready, HoldfastError):
                self._refused(get, number, ready)
            else:
                del get.coming[number]
                get.found[number] = attach
                self._answer(get)

        get.coming[number] = None
        try:
            self.attaches.attach_object(get.client, record, get.deadline_ns, granted)
        except HoldfastError as error:
            self._refused(get, number, error)

    def _refused(self, get: Get, number: int, error: HoldfastError) -> None:
        attach = get.coming.pop(number, None)
        if attach is not None:
            self._over.append(attach)
        get.refused[number] = error
        self._answer(get)

    def _answer(self, get: Get) -> None:
        if get.is_asked and not get.coming:
            get.answered(get)

    # Ends --------------------------------------------------------------------------------------

    def pump(self) -> None:
        """End the leases of what did not come, and answer those whose time is up."""
        now_ns = self.store.clock.monotonic_ns()
        for get in [get for get in self.open.values() if get.coming and get.deadline_ns <= now_ns]:
            for number in list(get.coming):
                self._refused(get, number, DeadlineExceeded("it did not come in time"))
        over, self._over = self._over, []
        for attach in over:
            self._end(attach)

    def _end(self, attach: Attach) -> None:
        if self.attaches.open.get(attach.lease.id) is attach:
            self.attaches.end(attach)

    def release(self, client: int, number: int) -> None:
        """End a batch's leases; copies stay where they are. Raises ClaimNotFound."""
        get = self.open.get(number)
        if get is None or get.client != client:
            raise ClaimNotFound(f"no lease {number} of this client; it ended")
        del self.open[number]
        self.give_up(get, list(get.found))
        for used in get.used:
            self.uses.released(used)

    def give_up(self, get: Get, numbers: Sequence[int]) -> None:
        """End the leases of some of a batch's objects."""
        for number in numbers:
            self._end(get.found.pop(number))

    def forget(self, client: int) -> None:
        """The client is gone, and with it its leases."""
        self.open = {number: get for number, get in self.open.items() if get.client != client}
