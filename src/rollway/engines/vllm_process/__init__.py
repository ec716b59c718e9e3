"""What runs in the environment of vLLM: standard library and vLLM only. `frames` is read on both sides."""
