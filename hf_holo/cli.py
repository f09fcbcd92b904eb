"""The command `hf-holo` from Python, and as `python -m hf_holo.cli`; see hf_holo_cli.py next to this package."""

import sys

from hf_holo_cli import VERBS, main, usage

__all__ = ["VERBS", "main", "usage"]

if __name__ == "__main__":
    sys.exit(main())
