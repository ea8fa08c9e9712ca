"""Starting processes, who talks to whom, and what is done with gradients and parameters.

Everything that asks for the number of data-parallel workers asks here, never
`torch.distributed` itself: with tensor or sequence parallelism that would be the wrong number.
"""

from fairseq.distributed.data_parallel import DistributedFairseqModel
from fairseq.distributed.utils import (
    all_gather_list,
    all_reduce,
    all_reduce_dict,
    broadcast_object,
    call_main,
    distributed_init,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_rank,
    get_world_size,
    infer_init_method,
    is_master,
)

__all__ = [
    "DistributedFairseqModel",
    "all_gather_list",
    "all_reduce",
    "all_reduce_dict",
    "broadcast_object",
    "call_main",
    "distributed_init",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_rank",
    "get_world_size",
    "infer_init_method",
    "is_master",
]
