"""``python -m subspace_meta``: the command line."""

from subspace_meta.cli import main

if __name__ == "__main__":
    main()
