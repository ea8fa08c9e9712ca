"""ALiBi language models with fairseq's commands, file formats and checkpoints.

Importing this package loads no torch; the rooms below load what they need.
"""

__version__ = "0.1.0"
