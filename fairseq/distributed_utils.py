"""The name under which plug-ins know `fairseq.distributed.utils`."""

from fairseq.distributed.utils import *  # noqa: F403
