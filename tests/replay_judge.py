"""An outsider's look at a replay: recomputes its result from the trace and the events, with no code of ours."""

import gzip
import json
from pathlib import Path

PARAMETERS, LAYERS, HIDDEN = 70e9, 80, 8192


def flops(tokens):
    return 2 * PARAMETERS * tokens + 2 * LAYERS * HIDDEN * tokens**2


def lines_of(path):
    raw = Path(path).read_bytes()
    text = gzip.decompress(raw) if str(path).endswith(".gz") else raw
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def chain_of(runs, join):
    """Units as (id of the last 512-token block, how many of them)."""
    blocks = [i for start, n in zip(runs[::2], runs[1::2], strict=True) for i in range(start, start + n)]
    groups = [blocks[at : at + join] for at in range(0, len(blocks), join)]
    return [(group[-1], len(group)) for group in groups]


def judge(trace_path, events_path, result):
    """Asserts that the events are possible, and that they make the result."""
    requests = lines_of(trace_path)
    heading, *events = lines_of(events_path)
    block_tokens = result["block_tokens"]
    chains = [chain_of(request["runs"], block_tokens // 512) for request in requests]
    previous = {unit: chain[at - 1] if at else None for chain in chains for at, unit in enumerate(chain)}
    assert {key: result[key] for key in heading} == heading
    assert len(events) == len(requests) == result["requests"]
    if result["capacity"].endswith("%"):
        assert result["capacity_blocks"] == int(len(previous) * float(result["capacity"][:-1]) / 100)
    resident, followers = set(), dict.fromkeys(previous, 0)
    saved = asked = hit = 0
    for number, (request, chain, event) in enumerate(zip(requests, chains, events, strict=True)):
        front = next((at for at, unit in enumerate(chain) if unit not in resident), len(chain))
        hit_tokens = min(front * block_tokens, request["in"])
        assert (event["request"], event["hit_blocks"], event["hit_tokens"]) == (number, front, hit_tokens)
        saved, asked, hit = saved + flops(hit_tokens), asked + flops(request["in"]), hit + hit_tokens
        for unit in map(tuple, event["evicted"]):
            resident.remove(unit)
            assert not followers[unit], "not a leaf"
            if previous[unit] is not None:
                followers[previous[unit]] -= 1
        for unit in map(tuple, event["inserted"]):
            assert unit in chain[front:], "nobody asked for it"
            assert unit not in resident
            assert previous[unit] is None or previous[unit] in resident, "a hole in front of it"
            resident.add(unit)
            assert len(resident) <= result["capacity_blocks"]
            if previous[unit] is not None:
                followers[previous[unit]] += 1
    assert abs(saved / asked - result["prefill_seconds_saved"]) < 1e-9
    assert abs(hit / sum(request["in"] for request in requests) - result["token_hit_ratio"]) < 1e-9


def write_trace(path, requests):
    """Requests as (ts, in, out, sid, blocks)."""
    rows = []
    for one in requests:
        ts, tokens, out, sid, blocks = one
        runs = [part for block in blocks for part in (block, 1)]
        rows.append(json.dumps({"ts": ts, "in": tokens, "out": out, "sid": sid, "runs": runs}))
    data = ("\n".join(rows) + "\n").encode()
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)
    return path
