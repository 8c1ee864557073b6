"""The loss of one call: kept on a tape while you compute it, replayed while predictions move.

May import all wings up to `engine`.
"""
