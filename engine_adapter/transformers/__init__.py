"""Transformers' hook: a `Cache` that reads a document layer by layer, and saves one after prefill."""
