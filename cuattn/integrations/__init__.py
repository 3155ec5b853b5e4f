"""cuattn inside other projects: `transformers`, `context_parallel` (torch.distributed) and `vllm`.

Each module imports the packages that it is for when it is loaded; nothing else in cuattn imports these modules.
"""
