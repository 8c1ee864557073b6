"""What keeps a call from leaving traces: interrupts, torch's modes, buffers, hooks, generators, exhausted memory.

May import `errors`, `common`.
"""
