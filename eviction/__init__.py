"""Who should leave.

This room knows candidates: their size and cost of return, and the uses that it is told of. It is
pure: no I/O, no clock of its own, no state beyond what it learned from the accesses it was told
about. It does not know documents, tiers, leases or bytes, and imports no other room, so the same
code decides in the daemon and in a simulation.
"""
