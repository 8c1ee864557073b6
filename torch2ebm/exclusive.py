"""Tracing, recording and compiling patch torch itself, for the whole process: one thread at a time may do so."""

from __future__ import annotations

import threading

TRACING = threading.RLock()
