"""The module's own run, watched: its operations, where a run is cut at nodes, and their graph without writes in place.

May import `errors`, `common`, `isolation`.
"""
