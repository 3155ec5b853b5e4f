"""vLLM: cuattn as the attention backend CUSTOM, registered by a plugin that vLLM finds by itself.

``pip install cuattn`` beside vLLM, then ``vllm serve ... --attention-backend CUSTOM``. The engine above, with its
tensor and pipeline parallelism, its scheduler and its prefix cache, stays vLLM's.

Written against the interface of vLLM 0.33.0 (vllm/v1/attention/backend.py); docs/integrations.md says what has run.
"""


def register() -> None:
    """The entry point of the group ``vllm.general_plugins``: names the backend, imports nothing of it.

    vLLM calls it in each of its processes, any number of times. A backend that another plugin has registered as CUSTOM
    stays.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, "cuattn.integrations.vllm.backend.CuattnBackend")
