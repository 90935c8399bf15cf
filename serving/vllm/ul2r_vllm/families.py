"""Networks of vLLM that can read prompts in both directions; imports nothing."""

FAMILIES = {
    "CohereForCausalLM": ("commandr", "commandr"),
    "GPT2LMHeadModel": ("gpt2", "gpt2"),
    "Gemma3ForCausalLM": ("gemma3", "gemma3"),
    "LlamaForCausalLM": ("llama", "llama"),
    "MistralForCausalLM": ("mistral", "llama"),
    "MixtralForCausalLM": ("mixtral", "mixtral"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "qwen3"),
}
"""By their name in config.json: module of the network, and module that makes its attention by the name `Attention`."""
