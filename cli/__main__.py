"""`python -m allaprima.cli` is `allaprima`."""

import sys

from allaprima.cli.main import main

sys.exit(main())
