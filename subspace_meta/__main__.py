"""``python -m subspace_meta``: the command line."""

from subspace_meta.cli import main

main()
