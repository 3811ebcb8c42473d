"""The `vllm` engine: a vLLM beside this process or in a Serve replica, with exact entropy."""
