"""Models on Megatron-Core: architecture, attention by intervals, a CPU as a device, Hugging Face form."""

import warnings

# Megatron-Core says at import which optional CUDA packages are absent, and uses collectives that torch has renamed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
warnings.filterwarnings(
    "ignore", category=FutureWarning, message=r"`load_state_dict` is deprecated"
)
warnings.filterwarnings("ignore", category=FutureWarning, message=r"Please use DTensor instead")
warnings.filterwarnings("ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor")
