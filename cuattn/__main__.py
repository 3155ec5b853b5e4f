"""``python -m cuattn`` is the command ``cuattn``."""

import sys

from cuattn.cli import main

sys.exit(main())
