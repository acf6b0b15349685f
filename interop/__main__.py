"""How far apart are jaxjd and TorchJD? `python -m interop` prints the report."""

import sys

from .report import main

sys.exit(main())
