"""A vLLM with a connector that gives its pages away and takes pages in, for test_pages.

    python pages_process.py '{"checkpoint": ..., "directory": ..., "block_tokens": ..., "prompts": [...]}'

Each prompt is {"name", "tokens", "count"}. Pages of its full blocks, by layer, are saved as NAME.saved.npy; where
NAME.load.npy lies there they are loaded instead of computed. The last line of the output is the answers.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata


@dataclass
class Moves(KVConnectorMetadata):
    """Block ids by prompt name."""

    loads: dict[str, list[int]] = field(default_factory=dict)
    saves: dict[str, list[int]] = field(default_factory=dict)


class PageConnector(KVConnectorBase_V1):
    """Whole blocks only, before and behind the forward pass, through files."""

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self.directory = Path(vllm_config.kv_transfer_config.kv_connector_extra_config["directory"])
        self.block_tokens = vllm_config.cache_config.block_size
        self.loads: dict[str, list[int]] = {}

    # In the scheduler --------------------------------------------------------------------------

    @staticmethod
    def name(request):
        return (request.kv_transfer_params or {}).get("name", "")

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        path = self.directory / f"{self.name(request)}.load.npy"
        if not path.exists():
            return 0, False
        return np.load(path, mmap_mode="r").shape[1] * self.block_tokens - num_computed_tokens, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            count = num_external_tokens // self.block_tokens
            self.loads[self.name(request)] = blocks.get_block_ids()[0][:count]

    def build_connector_meta(self, scheduler_output):
        moves = Moves(loads=self.loads)
        self.loads = {}
        for new in scheduler_output.scheduled_new_reqs:
            name = (new.sampling_params.extra_args or {}).get("kv_transfer_params", {}).get("name", "")
            moves.saves[name] = list(new.block_ids[0][: len(new.prompt_token_ids) // self.block_tokens])
        return moves

    # In the worker -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches):
        self.layers = [kv_caches[name].view(dtype=_bits(kv_caches[name])) for name in kv_caches]
        shapes = [
            [list(layer.shape), list(layer.stride()), str(kv_caches[name].dtype)]
            for name, layer in zip(kv_caches, self.layers, strict=True)
        ]
        (self.directory / "shapes.json").write_text(json.dumps(shapes))

    def start_load_kv(self, forward_context, **_):
        for name, blocks in self._get_connector_metadata().loads.items():
            pages = np.load(self.directory / f"{name}.load.npy")
            for layer, own in zip(self.layers, pages, strict=True):
                for block, page in zip(blocks, own, strict=True):
                    layer[block].numpy().reshape(-1)[:] = page

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, *_, **__):
        pass

    def wait_for_save(self):
        for name, blocks in self._get_connector_metadata().saves.items():
            pages = [[layer[block].numpy().reshape(-1).copy() for block in blocks] for layer in self.layers]
            np.save(self.directory / f"{name}.saved.npy", np.array(pages))


def _bits(tensor):
    import torch

    return {2: torch.uint16, 4: torch.uint32}[tensor.element_size()]


def packed(isa, tokens, dim):
    """A page of two heads, packed by the kernel of an ISA: keys are 0, 1, ... by token, head, dim; values follow."""
    import torch
    from vllm import _custom_ops as ops

    numbers = torch.arange(tokens * 2 * dim).reshape(tokens, 2, dim)
    key, value = (part.to(torch.int16).view(torch.bfloat16) for part in (numbers, numbers + numbers.numel()))
    page = torch.zeros(1, 2, tokens, 2 * dim, dtype=torch.bfloat16)
    halves = page.view(1, 2, 2 * tokens, dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, torch.arange(tokens), isa)
    return page.view(torch.uint16).numpy()


def main() -> None:
    told = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints where it likes
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=told["checkpoint"],
        skip_tokenizer_init=True,
        max_model_len=1024,
        block_size=told["block_tokens"],
        enforce_eager=True,
        seed=0,
        disable_hybrid_kv_cache_manager=True,
        distributed_executor_backend="uni",
        kv_transfer_config={
            "kv_connector": "PageConnector",
            "kv_connector_module_path": "pages_process",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"directory": told["directory"]},
        },
    )
    found = {}
    for prompt in told["prompts"]:
        llm.reset_prefix_cache()
        sampling = SamplingParams(
            temperature=0,
            max_tokens=prompt["count"],
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": {"name": prompt["name"]}},
        )
        (output,) = llm.generate([{"prompt_token_ids": prompt["tokens"]}], sampling, use_tqdm=False)
        found[prompt["name"]] = [list(output.outputs[0].token_ids), output.num_cached_tokens or 0]
    for isa, dim in (("vec", 64), ("vec", 128), ("vec16", 80)):
        np.save(Path(told["directory"]) / f"{isa}-{dim}.npy", packed(isa, told["block_tokens"], dim))
    answers.write(json.dumps(found) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
