"""HTML pages of a run and of a comparison, each one file that loads nothing: skeleton, style, script and contents.

May import `reports`, and all wings that it may.
"""
