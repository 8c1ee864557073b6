"""Predictive coding's relaxation: the energy's gradient in values and errors, the solver contract, the loop.

May import all wings up to `programs`.
"""
