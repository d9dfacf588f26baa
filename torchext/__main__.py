"""``python -m torchext``: the same as the ``torchext`` command."""

import sys

from torchext.cli import main

sys.exit(main())
