"""vLLM's hooks: the connector that loads and saves documents' KV, and the secondary tier of vLLM's own offloading."""
