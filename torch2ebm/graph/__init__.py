"""From a capture to an energy graph: which operations make a value node, and one function for each node.

May import `errors`, `common`, `isolation`, `capture`.
"""
