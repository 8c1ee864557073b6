"""One call, evaluated: its values, node by node; energies, nudging, local gradients and results.

May import `errors`, `common`, `isolation`, `capture`, `graph`, `memory`.
"""
