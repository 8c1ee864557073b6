"""Which values are given and which are found or drawn: any node, input or output of one energy.

May import all wings up to `solvers`.
"""
