"""``python -m fastlenet``: the command line of `fastlenet.cli`."""

import sys

from fastlenet.cli import main

if __name__ == "__main__":
    sys.exit(main())
