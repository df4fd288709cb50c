"""``python -m subspace_meta.cli``."""

from subspace_meta.cli import main

if __name__ == "__main__":
    main()
