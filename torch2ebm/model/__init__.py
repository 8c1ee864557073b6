"""The converted model: its view as the module, its captures, and what `loss.backward()` runs.

May import all wings up to `algorithms`, and `reports`.
"""
