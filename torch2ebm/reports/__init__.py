"""What you look at: tables, drawings, plots, and how well two gradients agree.

May import all wings up to `inference`.
"""
