"""Energies that a user gives to nodes: robust ones, those of counts, functions; their checks, their own parameters.

May import all wings up to `engine`.
"""
