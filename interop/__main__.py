"""Print how far apart jaxjd and TorchJD are: `python -m interop`."""

import sys

from .report import main

sys.exit(main())
