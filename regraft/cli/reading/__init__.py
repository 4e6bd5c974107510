"""Looking into files that anyone may have made: nothing named in a file is imported, called or run.

No file here imports torch (but `skeleton.py`, which a plan needs): a look into a file starts at once and
takes no more memory than the file's own description of the model.
"""
