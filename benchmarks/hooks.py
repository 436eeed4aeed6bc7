"""What hooks cost: a hook beside torch's own, and a forward with every block captured beside none.

python -m benchmarks.hooks [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.timing import interleave, ratio, show
from flexcache import FlexModel, HookFunction

HOOKS, CALLS = 32, 200


def same(module: nn.Module, x: torch.Tensor, save_ctx: object, modules: object) -> torch.Tensor:
    return x


def captured(model: nn.Module, names: list[str], edit: object = None, kind: str = "forward") -> tuple[FlexModel, dict]:
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, acts)
    for name in names:
        getattr(flex, f"register_{kind}_hook")(HookFunction(name, editing_function=edit))
    return flex, acts


def per_hook(rounds: int) -> None:
    """32 layers so small that the hooks are most of the time."""
    x = torch.randn(1, 16)

    def stack() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(16, 16) for _ in range(HOOKS)))

    names = [str(number) for number in range(HOOKS)]
    kept: list[torch.Tensor] = []
    bare, empty, cloning = stack(), stack(), stack()
    for module in empty:
        module.register_forward_hook(lambda m, a, o: None)
    for module in cloning:
        module.register_forward_hook(lambda m, a, o: kept.append(o.detach().clone()))
    read, acts = captured(stack(), names)
    edited, more = captured(stack(), names, same)

    def times(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    model(x)
            for found in (kept, *acts.values(), *more.values()):
                found.clear()

        return run

    variants = {"bare": bare, "empty": empty, "clone": cloning, "read": read, "edit": edited}
    seconds = interleave({name: times(model) for name, model in variants.items()}, rounds)
    cost = {
        name: statistics.median(a - b for a, b in zip(found, seconds["bare"], strict=True)) / CALLS / HOOKS * 1e6
        for name, found in seconds.items()
    }
    rows = [
        ("an empty hook of torch", f"{cost['empty']:.1f} µs", "the floor"),
        ("a hook of torch that clones into a list", f"{cost['clone']:.1f} µs", "a peer"),
        (
            "FlexModel, read",
            f"{cost['read']:.1f} µs, {cost['read'] / cost['clone']:.1f} × the clone",
            "FlexModel 0.1: 13–14 µs",
        ),
        ("FlexModel, read and edit", f"{cost['edit']:.1f} µs, {cost['edit'] / cost['clone']:.1f} × the clone", ""),
    ]
    show(f"per hook, {HOOKS} layers of 16 features", rows)


def llama(layers: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=384, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=6
    )
    return transformers.LlamaForCausalLM(config).eval()


def forward(rounds: int) -> None:
    """All 32 blocks captured to memory."""
    ids = torch.randint(1024, (8, 128))
    bare, cloning = llama(), llama()
    kept: list[torch.Tensor] = []
    for block in cloning.model.layers:
        block.register_forward_hook(lambda m, a, o: kept.append(o.detach().clone()))
    flex, acts = captured(llama(), [f"model.layers.{layer}" for layer in range(32)])

    def times(model: nn.Module, **options: object) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, logits_to_keep=1, **options)
            for found in (kept, *acts.values()):
                found.clear()

        return run

    variants = {
        "bare": times(bare),
        "clone": times(cloning),
        "output_hidden_states": times(bare, output_hidden_states=True),
        "FlexModel": times(flex),
    }
    seconds = interleave(variants, rounds)
    targets = {"FlexModel": "≤ 1.1 (FlexModel's paper, GPU: 21–49)"}
    rows = [
        (name, f"{ratio(found, seconds['bare']):.3f}", targets.get(name, "a peer"))
        for name, found in seconds.items()
        if name != "bare"
    ]
    show("a forward of 32 layers with every block captured ÷ the bare forward", rows)


def parallel(rounds: int) -> None:
    """The same under tensor parallelism: two processes, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("-m", "benchmarks.hooks", "--worker", str(result), "--rounds", str(rounds)),
        ]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = json.loads(result.read_text())
    targets = {"blocks": "≤ 1.1"}
    said = {
        "blocks": "every block's output, replicated",
        "neurons": "every MLP's neurons, sharded",
        "edit": "an edit of every block's output",
    }
    rows = [
        (said[name], f"{ratio(found, seconds['bare']):.3f}", targets.get(name, ""))
        for name, found in seconds.items()
        if name != "bare"
    ]
    show("the same under tensor parallelism, two processes of one thread ÷ the bare sharded forward", rows)


def worker(result: Path, rounds: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, ids = llama(), torch.randint(1024, (8, 128), generator=torch.Generator().manual_seed(0))
    columns, rows = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        ("self_attn.o_proj", "mlp.down_proj"),
    )
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in rows}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    acts: dict[str, list[torch.Tensor]] = {}
    flex = FlexModel(model, acts)
    flex.create_hook_group("blocks", "model.layers.*")
    flex.create_hook_group("neurons", "model.layers.*.mlp.down_proj", hook_type="forward_pre")
    for layer in range(32):
        function = HookFunction(f"model.layers.{layer}", editing_function=same, record=False)
        flex.register_forward_hook(function)
        flex.update_hook_groups(function, "edit")

    def times(groups: str, complement: bool = False) -> Callable[[], float]:
        def run() -> float:
            dist.barrier()
            began = time.perf_counter()
            with torch.no_grad():
                flex(input_ids=ids, use_cache=False, logits_to_keep=1, groups=groups, complement=complement)
            took = time.perf_counter() - began
            acts.clear()
            return took

        return run

    variants = {"bare": times("all", complement=True), **{name: times(name) for name in ("blocks", "neurons", "edit")}}
    seconds = interleave(variants, rounds)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.rounds)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    per_hook(options.rounds)
    forward(options.rounds)
    parallel(options.rounds)


if __name__ == "__main__":
    main()
