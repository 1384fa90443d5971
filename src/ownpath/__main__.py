"""``python -m ownpath``"""

import sys

from ownpath.cli import main

sys.exit(main())
