"""The commands of the command line, a file each, whose `main` takes the arguments and returns the exit code.

A command's file imports nothing that is slow to import until its arguments are parsed; work that is long stands in a
file beside it (`inspect.py`, `inspected.py`).
"""
