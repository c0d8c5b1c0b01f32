"""`python -m fastpref` is the command `fastpref`."""

from .cli import main

raise SystemExit(main())
