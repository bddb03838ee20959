"""Merged models on the CPU: packed weights, threads, and the parts written in C, which this package registers."""

from tome_server.merging import dispatch
from tome_server.merging.cpu import attention_c, matching_c

dispatch.MATCHING_KERNELS.append(matching_c)
dispatch.ATTENTION_KERNELS.append(attention_c)
