"""Refuses a second copy of this folder; every module here imports this one, relatively.

From the repository's root `import profiling.session` finds the folder too, and its classes would be others than
fourfold's. The sibling folders refuse that in their `__init__.py`. This one must not have any: from Python 3.15 the
standard library has a package `profiling` (PEP 799) which cProfile imports, and a regular package of that name in the
working directory would stand in its way; a folder without `__init__.py` does not.
"""

if __name__ != "fourfold.profiling.only_copy":
    raise ImportError(
        f"import fourfold.profiling, not {__name__.rpartition('.')[0]!r}: a second copy would make second classes"
    )
