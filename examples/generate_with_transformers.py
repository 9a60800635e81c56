"""Generate with Transformers: a prompt that was seen before is read instead of computed, in this process or the next.

Run: python examples/generate_with_transformers.py [DATA_DIR [MODEL_DIR]]     (needs `holdfast serve`)
Without a model, a small random one that reads bytes.
"""

import sys
from pathlib import Path

import torch
from holdfast.engine_adapter.transformers import cached
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import holdfast

text = (Path(__file__).parent / "opticks.txt").read_text()[:3000]
if len(sys.argv) > 2:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
    ids = AutoTokenizer.from_pretrained(sys.argv[2])(text, return_tensors="pt").input_ids
else:
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.tensor([list(text.encode())])

with holdfast.connect(data_dir=sys.argv[1] if len(sys.argv) > 1 else None) as store:
    with cached(store, model, ids) as cache:
        answer = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    print(f"read {cache.reused_tokens} of {ids.shape[1]} tokens")
    print("answer", answer[0, ids.shape[1] :].tolist())
