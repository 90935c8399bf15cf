"""Models on Megatron-Core: architecture, interval attention, CPU support, conversion to and from Hugging Face."""

import logging
import warnings

from ul2r.model.lazy_compile import compile_lazily

# On import, Megatron-Core warns of each optional CUDA package that is absent and calls collectives that torch renamed.
# Set before its first import, since tests turn warnings into errors.
# Those of a module that imports another are attributed to lazy_compile.py, which runs both.
_MODULES = r"megatron\.core\.|ul2r\.model\.lazy_compile"
warnings.filterwarnings("ignore", category=UserWarning, module=_MODULES)
warnings.filterwarnings("ignore", category=DeprecationWarning, module=_MODULES)
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
warnings.filterwarnings(
    "ignore", category=FutureWarning, message=r"`load_state_dict` is deprecated"
)
warnings.filterwarnings("ignore", category=FutureWarning, message=r"Please use DTensor instead")
warnings.filterwarnings("ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor")

# Megatron-Core 0.19 imports it, and torch then logs each CUDA toolkit that it finds on a machine without a GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

compile_lazily()
