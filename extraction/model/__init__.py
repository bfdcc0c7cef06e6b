"""Models: loading, chat templates, the KV cache, devices and memory, LoRA adapters, hooks and fast decode attention.

May import `core` and `config`. Start at `loading.load` for a model from a folder or the hub, `loading.wrap` for one in
memory, and `kv_cache.make_cache` for the cache that the engine decodes through.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "LanguageModel": "loading",
    "ModelPair": "pairs",
    "auto_batch_size": "memory",
    "encode_conversation": "chat_template",
    "encode_example": "chat_template",
    "load": "loading",
    "load_pair": "pairs",
    "read_tokenizer": "loading",
    "steer": "hooks",
    "watch": "hooks",
    "watch_attention": "attention_weights",
    "wrap": "loading",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)
