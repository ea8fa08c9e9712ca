"""The public face of this room under the name that plug-ins know, `distributed_utils`."""

from fairseq.distributed.collectives import (
    all_gather_list,
    all_reduce,
    all_reduce_dict,
    broadcast_object,
    gather_and_sum,
)
from fairseq.distributed.groups import (
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_global_group,
    get_gradient_group,
    get_mesh,
    get_rank,
    get_world_size,
    is_initialized,
    is_master,
    set_data_parallel_group,
    set_mesh,
)
from fairseq.distributed.launch import call_main, distributed_init, infer_init_method

__all__ = [
    "all_gather_list",
    "all_reduce",
    "all_reduce_dict",
    "broadcast_object",
    "call_main",
    "distributed_init",
    "gather_and_sum",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_global_group",
    "get_gradient_group",
    "get_mesh",
    "get_rank",
    "get_world_size",
    "infer_init_method",
    "is_initialized",
    "is_master",
    "set_data_parallel_group",
    "set_mesh",
]
