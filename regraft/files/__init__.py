"""Reading files that anyone may have written: nothing that a file names is imported, called or run.

No module here imports torch but `skeleton.py`, which a plan needs.
"""
