"""The names, in settings, of the types that models may run in."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
DtypeSetting = Literal["auto", "float32", "bfloat16", "float16"]
