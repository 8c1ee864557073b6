"""The Hopfield-type energy of a module: its states, their steps, phases that settle, and linear solvers.

May import all wings up to `inference`.
"""
