"""vLLM's CPU pages against Transformers and the built-in runner: one bf16 checkpoint, the same tokens, both ways.

How equality is judged: values of the first layer, which no rounding of attention has touched, bit for bit; all other KV
by its distance from KV computed in float32, which must not be larger than that of Transformers' bf16 KV by more than a
little (measured: 0.9 times); logits within a bound; greedy tokens of a prompt whose answer is not in doubt. Each with a
control that must differ.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from holdfast.engine_adapter.api import Store
from holdfast.engine_adapter.group import GroupOptions, RankGroup
from holdfast.engine_adapter.pages import key_value, native, vllm_cpu_vec, vllm_flash_hnd
from holdfast.engine_adapter.session import Session
from holdfast.kvstore.client import Client
from holdfast.ring_attention.identity import digest_of, read_config, spec_of
from holdfast.ring_attention.synthetic import DEMO, write_checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

from daemon_process import DaemonProcess

pytestmark = pytest.mark.timeout(400)  # the first test starts Transformers, a group and a vLLM
HERE = Path(__file__).parent
PAGE = 32
STORED = 6 * PAGE  # tokens in whole pages
NEW = 12
LOGITS_BOUND = 0.15  # their standard deviation is 1, and three times what was measured
CONFIG = replace(DEMO, dtype="bfloat16", layers=3)
SHAPE = (CONFIG.kv_heads, CONFIG.head_dim, CONFIG.head_dim)
FORMAT = vllm_cpu_vec(PAGE, *SHAPE)
SETTINGS = {
    "ddr__capacity_bytes": "64 MiB",
    "ddr__slab_bytes": "8 MiB",
    "nvme__capacity_bytes": "64 MiB",
    "nvme__segment_bytes": "8 MiB",
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def bits(tensor):
    """bfloat16 as uint16, in numpy."""
    return tensor.contiguous().view(torch.uint16).numpy()


def floats(array):
    """The numbers that uint16 bits of bfloat16 are."""
    return torch.from_numpy(np.ascontiguousarray(array)).view(torch.bfloat16).float().numpy()


def decoded(form, pages):
    """Keys and values [layers, heads, tokens, dim] of pages [layers, pages, elements]."""
    return [
        view.transpose(0, 2, 1, 3, 4).reshape(view.shape[0], view.shape[2], -1, view.shape[4])
        for view in key_value(form, pages)
    ]


class Oracle:
    """Transformers, in bf16 or float32."""

    def __init__(self, checkpoint, dtype):
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)

    @torch.no_grad()
    def surest(self, prompts):
        """Of these prompts the one whose greedy answer is least in doubt, and its answer."""
        made = self.model.generate(
            torch.tensor(prompts), max_new_tokens=NEW, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        best = torch.stack(made.scores, 1).topk(2).values
        index = int((best[..., 0] - best[..., 1]).amin(1).argmax())
        return prompts[index], made.sequences[index, len(prompts[index]) :].tolist()

    @torch.no_grad()
    def kv(self, tokens):
        """Keys and values [layers, heads, tokens, dim]."""
        cache = DynamicCache()
        self.model(torch.tensor([tokens]), past_key_values=cache)
        return [torch.cat([getattr(layer, part) for layer in cache.layers]) for part in ("keys", "values")]

    @torch.no_grad()
    def goes_on(self, tokens, kv):
        """The greedy answer to a prompt of whose first tokens this is the KV (bits of bf16), and its first logits."""
        key, value = (torch.from_numpy(np.ascontiguousarray(array)).view(torch.bfloat16) for array in kv)
        cache = DynamicCache()
        for layer in range(CONFIG.layers):
            cache.update(key[layer][None], value[layer][None], layer)
        made = self.model.generate(
            torch.tensor([tokens]),
            past_key_values=cache,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return made.sequences[0, len(tokens) :].tolist(), made.logits[0][0].float().numpy()


class Stage:
    """A daemon with the built-in runner, Transformers, and what one vLLM process made of the same prompt."""

    def __init__(self, daemon, directory, stack):
        self.directory, self.checkpoint = directory, directory / "checkpoint"
        write_checkpoint(self.checkpoint, CONFIG)
        self.spec = spec_of(read_config(self.checkpoint), digest_of(self.checkpoint))
        self.native = native(self.spec, FORMAT)
        self.oracle, exact = Oracle(self.checkpoint, torch.bfloat16), Oracle(self.checkpoint, torch.float32)
        drawn = np.random.default_rng(0).integers(0, CONFIG.vocabulary_size, (16, STORED + 9)).tolist()
        self.prompt, self.wanted = self.oracle.surest(drawn)
        self.front, self.question = self.prompt[:STORED], self.prompt[STORED:]
        self.kv = [bits(part) for part in self.oracle.kv(self.front)]
        self.exact = [part.numpy() for part in exact.kv(self.front)]
        self.store = stack.enter_context(Store(Client(daemon.socket)))
        options = GroupOptions(
            name="runner",
            model=self.checkpoint,
            cp=2,
            rows=300,
            daemon_socket=daemon.socket,
            threads=1,
            strategy="pass_kv",
        )
        engine = stack.enter_context(RankGroup(options, self.spec))
        self.session = Session(stack.enter_context(closing(Client(daemon.socket))), engine)
        self.session.ingest("runner", self.front)
        with self.store.attach("runner") as document:
            gathered = [layer.gathered() for layer in document.layers()]
        self.runner_kv = [np.stack(arrays) for arrays in zip(*gathered, strict=True)]
        loads = {
            "vllm": None,
            "transformers": self.encoded(FORMAT, self.kv),
            "runner": self.encoded(FORMAT, self.runner_kv),
            "control": self.encoded(vllm_flash_hnd(PAGE, *SHAPE), self.kv),
        }
        self.answers = self.vllm(loads)
        self.pages = np.load(directory / "vllm.saved.npy")
        with self.store.ingest("vllm", self.native, self.front) as writer:
            for layer in range(CONFIG.layers):

                def fill(first, view, own=self.pages[layer]):
                    view[...] = own[first : first + len(view)].view(np.uint8)

                writer.write_pages(layer, 0, STORED // PAGE, fill)

    def encoded(self, form, kv):
        """KV as pages of a format, [layers, pages, elements]: written to a native document by the store, and read."""
        spec = native(self.spec, form, accept="any")
        with self.store.ingest("encoded", spec, self.front) as writer:
            for layer in range(CONFIG.layers):
                writer.write(layer, 0, kv[0][layer], kv[1][layer])
        with self.store.attach("encoded", spec=spec) as document:
            pages = [
                np.concatenate([view.reshape(-1, view.shape[-1]) for _, view in layer.pages()]).view(np.uint16)
                for layer in document.layers()
            ]
        self.store.delete("encoded")
        return np.array(pages)

    def vllm(self, loads):
        """By name (greedy tokens, how many were cached) of one vLLM that is asked with and without pages to load."""
        for name, pages in loads.items():
            if pages is not None:
                np.save(self.directory / f"{name}.load.npy", pages)
        told = {
            "checkpoint": str(self.checkpoint),
            "directory": str(self.directory),
            "block_tokens": PAGE,
            "prompts": [{"name": name, "tokens": self.prompt, "count": NEW} for name in loads],
        }
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        log = self.directory / "vllm.log"
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, str(HERE / "pages_process.py"), json.dumps(told)],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                timeout=300,
                check=False,
            )
        assert done.returncode == 0, log.read_text()[-6000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    torch.set_num_threads(1)
    with DaemonProcess(**SETTINGS) as daemon, ExitStack() as stack:
        yield Stage(daemon.start(), tmp_path_factory.mktemp("pages"), stack)


def distance(kv, exact):
    """Mean distance of every layer's keys and values (bits of bf16) from those in float32: [2, layers]."""
    return np.array(
        [np.abs(floats(part) - wanted).mean(axis=(1, 2, 3)) for part, wanted in zip(kv, exact, strict=True)]
    )


def test_the_tensor_is_what_the_format_was_written_for(stage):
    """Another ISA, backend or version may pack otherwise: then this fails first."""
    for shape, stride, dtype in json.loads((stage.directory / "shapes.json").read_text()):
        assert dtype == "torch.bfloat16"
        assert shape[1:] == [CONFIG.kv_heads, PAGE, 2 * CONFIG.head_dim]
        assert stride == [FORMAT.elements, 2 * PAGE * CONFIG.head_dim, 2 * CONFIG.head_dim, 1]


@pytest.mark.parametrize(("isa", "dim"), [("vec", 64), ("vec", 128), ("vec16", 80)])
def test_the_kernels_of_x86_without_amx_pack_alike(stage, isa, dim):
    """Head sizes that are no multiple of 32 go to "vec16". (AMX packs tiles: no strides say that.)"""
    page = np.load(stage.directory / f"{isa}-{dim}.npy").reshape(1, -1)
    key, value = key_value(vllm_cpu_vec(PAGE, 2, dim, dim), page)
    numbers = np.arange(PAGE * 2 * dim, dtype=np.uint16).reshape(PAGE, 2, dim).transpose(1, 0, 2)
    assert np.array_equal(key[0], numbers)
    assert np.array_equal(value[0], numbers + numbers.size)


def test_decoded_pages_are_the_kv_of_transformers(stage):
    kv = decoded(FORMAT, stage.pages)
    assert np.array_equal(kv[1][0], stage.kv[1][0]), "values of the first layer"
    ours, theirs = distance(kv, stage.exact), distance(stage.kv, stage.exact)
    assert (ours <= 1.25 * theirs).all(), (ours, theirs)
    wrong = decoded(vllm_flash_hnd(PAGE, *SHAPE), stage.pages)
    assert (distance(wrong, stage.exact) > 20 * theirs).all()
    assert not np.array_equal(wrong[1][0], stage.kv[1][0])


def test_transformers_goes_on_from_what_vllm_prefilled(stage):
    with stage.store.attach("vllm", spec=stage.spec) as document:
        gathered = [layer.gathered() for layer in document.layers()]
    kv = [np.stack(arrays) for arrays in zip(*gathered, strict=True)]
    for ours, wanted in zip(kv, decoded(FORMAT, stage.pages), strict=True):
        assert np.array_equal(ours, wanted), "the store has decoded the same bits"
    tokens, logits = stage.oracle.goes_on(stage.prompt, kv)
    own, wanted = stage.oracle.goes_on(stage.prompt, stage.kv)
    assert tokens == own == stage.wanted
    assert np.abs(logits - wanted).max() < LOGITS_BOUND
    wrong, far = stage.oracle.goes_on(stage.prompt, decoded(vllm_flash_hnd(PAGE, *SHAPE), stage.pages))
    assert wrong != stage.wanted
    assert np.abs(far - wanted).max() > 5 * LOGITS_BOUND


def test_the_runner_attaches_what_vllm_prefilled(stage):
    """Two ranks decode the pages into their rows; the same answer as from the KV that they made themselves."""
    found = stage.session.ask("vllm", stage.question, NEW).answer
    own = stage.session.ask("runner", stage.question, NEW).answer
    assert found.tokens == own.tokens == stage.wanted
    assert np.abs(found.logits - own.logits).max() < LOGITS_BOUND


def test_vllm_goes_on_from_what_others_prefilled(stage):
    assert stage.answers["vllm"] == [stage.wanted, 0]
    assert stage.answers["transformers"] == [stage.wanted, STORED]
    assert stage.answers["runner"] == [stage.wanted, STORED]
    tokens, cached = stage.answers["control"]
    assert cached == STORED
    assert tokens != stage.wanted
