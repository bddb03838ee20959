"""The types that models may run in, as settings name them."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
DtypeSetting = Literal["auto", "float32", "bfloat16", "float16"]
