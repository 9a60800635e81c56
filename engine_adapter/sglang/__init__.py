"""SGLang's hook: a dynamic HiCache storage backend, over opaque objects."""
