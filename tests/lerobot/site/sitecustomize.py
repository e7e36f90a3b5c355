"""Python runs this at its start where this folder is on PYTHONPATH: cameras of commands are fake where asked for."""

import os
import sys
from pathlib import Path

if "FAKE_CAMERAS" in os.environ:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import fake_cameras

    sys.path.pop(0)
    fake_cameras.install()
