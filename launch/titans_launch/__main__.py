"""`python -m titans_launch` is `titans-dist`."""

import sys

from titans_launch.cli import main

sys.exit(main())
