"""Implicit SGD and IL-prox: dense layers, the proximal objective, Newton's method, curvature.

May import all wings up to `inference`.
"""
