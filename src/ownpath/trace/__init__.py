"""Observers of a running model: counts, records of calls, launched kernels. Nothing here changes what is computed."""

from ownpath.trace.ledger import Ledger
from ownpath.trace.observers import Observer, Tap
from ownpath.trace.records import Record, Records

__all__ = ["Ledger", "Observer", "Record", "Records", "Tap"]
