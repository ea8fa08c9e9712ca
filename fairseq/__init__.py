"""ALiBi language models with fairseq's commands, file formats and checkpoints.

Importing this package loads no torch; the rooms below load what they need.
"""

import sys

from fairseq.logging import meters, metrics, progress_bar

__version__ = "0.1.0"

# The names that plug-ins know from before these modules had a package of their own.
sys.modules["fairseq.meters"] = meters
sys.modules["fairseq.metrics"] = metrics
sys.modules["fairseq.progress_bar"] = progress_bar
