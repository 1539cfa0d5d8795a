"""Tensor-parallel layers give what one process gives: outputs, gradients, merges, files.

The processes of each number are started once and run every case; the tests read what they found. `Model` has a layer of every
style: column- and row-parallel, packed, with a gathered output, with an input that the layer splits itself.
"""

from __future__ import annotations

import copy
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halotune import BoneConfig, HRAConfig, LoHaConfig, LoraConfig, MissConfig, OFTConfig, PeftModel, get_peft_model
from halotune.core.errors import HalotuneError

from .launch import spawn

STYLES = {
    "q": "colwise",
    "o": "rowwise",
    "gate_up": "packed_colwise",
    "down": "rowwise",
    "gathered": "colwise_gather_output",
    "split": "rowwise_split_input",
    "head": "colwise_gather_output",
}
METHODS: dict[str, Callable[..., Any]] = {
    "hra": lambda **kw: HRAConfig(r=4, **kw),
    "hra-gs": lambda **kw: HRAConfig(r=3, apply_GS=True, init_weights=False, **kw),
    "loha": lambda **kw: LoHaConfig(r=2, **kw),
    "loha-large": lambda **kw: LoHaConfig(r=12, **kw),
    "bone": lambda **kw: BoneConfig(r=5, **kw),
    "miss-mini": lambda **kw: MissConfig(r=6, mini_r=2, init_weights="mini", **kw),
    "bat": lambda **kw: BoneConfig(r=4, init_weights="bat", **kw),
    "oft": lambda **kw: OFTConfig(oft_block_size=4, **kw),
    "oft-coft": lambda **kw: OFTConfig(oft_block_size=4, coft=True, eps=0.5, use_cayley_neumann=False, **kw),
    "oft-shared": lambda **kw: OFTConfig(oft_block_size=4, block_share=True, **kw),
    "lora": lambda **kw: LoraConfig(r=3, **kw),
}
BLOCKS = {"bat", "oft", "oft-coft", "oft-shared"}  # that a border between columns may not cut through


class Model(nn.Module):
    """Sizes that 2 and 4 divide into blocks of 4; or, uneven, that they do not."""

    def __init__(self, uneven: bool) -> None:
        super().__init__()
        d, m, f = (14, 22, 10) if uneven else (16, 32, 32)
        self.q, self.o = nn.Linear(d, m), nn.Linear(m, d)
        self.gate_up, self.down = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)
        self.gathered, self.split = nn.Linear(d, d), nn.Linear(d, d)
        self.head = nn.Linear(d, d + (2 if uneven else 4))
        self.checkpointed = False

    def block(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.tanh(self.q(x)))
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(torch.sigmoid(gate) * up)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        x = x + self.split(torch.tanh(self.gathered(x)))
        return self.head(x)


def plain(uneven: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(uneven)


def parallel(uneven: bool = False, mesh: Any = None) -> Any:
    return spread(plain(uneven), STYLES, mesh)


def spread(model: nn.Module, styles: dict[str, str], mesh: Any = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh(device(), (dist.get_world_size(),), mesh_dim_names=("tp",)) if mesh is None else mesh
    plan: dict[str, str] = {}
    for name, style in styles.items():
        plan |= {f"{name}.{p}": style for p, _ in model.get_submodule(name).named_parameters()} | {name: style}
    return apply_tensor_parallelism(model, mesh, plan)


def sample(model: Any, seed: int = 3) -> Tensor:
    d = next(m for n, m in model.named_modules() if n.endswith("q")).in_features
    return drawn(3, 5, d, seed=seed).requires_grad_()


def drawn(*size: int, seed: int = 0) -> Tensor:
    """The same numbers in every process."""
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(device())


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def change(*models: nn.Module) -> None:
    """Give the adapters of all of them the same parameters, away from their start."""
    torch.manual_seed(7)
    parameters = [trained(m) for m in models]
    with torch.no_grad():
        for name, p in parameters[0].items():
            if any(hasattr(others[name], "placements") for others in parameters):
                continue  # a bias of the base
            new = p + 0.3 * torch.randn(p.shape)
            for others in parameters:
                others[name].copy_(new)


def pair(config: Any, uneven: bool = False, **kwargs: Any) -> tuple[PeftModel, PeftModel]:
    """One process's model and the parallel one, with the same adapters."""
    reference = get_peft_model(plain(uneven), copy.deepcopy(config), **kwargs)
    model = get_peft_model(parallel(uneven), copy.deepcopy(config), **kwargs)
    assert trained(reference).keys() == trained(model).keys()
    change(reference, model)
    return reference, model


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    a, b = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (a, b))  # type: ignore[operator]
    error = float((a.detach() - b.detach()).norm() / b.detach().norm().clamp_min(1e-6))
    assert error < tolerance, f"off by {error:.1e}"


def backward(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    model.zero_grad()
    x.grad = None
    y = model(x, **kwargs)
    y.square().mean().backward()
    assert x.grad is not None
    return [y, x.grad, *[p.grad for p in trained(model).values() if p.grad is not None]]


def agree(reference: nn.Module, model: nn.Module, tolerance: float = 2e-5, **kwargs: Any) -> None:
    x = sample(reference)
    expected, found = (backward(m, x, **kwargs) for m in (reference, model))
    assert len(expected) == len(found) > 2
    for a, b in zip(found, expected, strict=True):
        close(a, b, tolerance)
    with torch.no_grad():
        close(model(x, **kwargs), reference(x, **kwargs), tolerance)


# -- cases: functions of nothing, which every process runs


def outputs_and_gradients(method: str, uneven: bool) -> None:
    names = ["q", "o", "down", "split"] if method == "miss-mini" and uneven else list(STYLES)
    agree(*pair(METHODS[method](target_modules=names), uneven))


CASES: dict[str, Callable[[], None]] = {}
for _method in METHODS:
    for _uneven in (False, True):
        if not (_uneven and _method in BLOCKS):
            CASES[f"{_method}{'-uneven' if _uneven else ''}"] = lambda m=_method, u=_uneven: outputs_and_gradients(m, u)


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


@case
def blocks_that_a_border_between_rows_cuts_through() -> None:
    """Each process runs its rows of a block; the gradients of the block are summed."""
    agree(*pair(BoneConfig(r=2, init_weights="bat", target_modules=["q", "gate_up"]), uneven=True))
    agree(*pair(BoneConfig(r=4, init_weights="bat", target_modules=["head"])))


@case
def blocks_that_a_border_between_columns_cuts_through_are_refused() -> None:
    bounds = {2: [0, 7, 14], 4: [0, 4, 8, 12, 14]}[dist.get_world_size()]
    here = ":".join(str(b) for b in bounds[dist.get_rank() :][:2])
    for kind, config in (("Bat", BoneConfig(r=14, init_weights="bat")), ("OFT", OFTConfig(oft_block_size=14))):
        config.target_modules = ["split"]
        message = (
            rf"^split: each process holds some columns .* weight \(14, 14\), here {here}, .* 14 of {kind}\. .*rank_pattern"
        )
        model = parallel(uneven=True)
        before = dict(model.named_modules())
        with pytest.raises(HalotuneError, match=message):
            get_peft_model(model, copy.deepcopy(config))
        assert dict(model.named_modules()) == before
        config.rank_pattern = {"split": math.gcd(*bounds)}  # what the message asks for
        agree(*pair(config, uneven=True))


@case
def shards_with_nothing_in_them() -> None:
    """Three rows, or columns, for four processes."""

    def tiny() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 6))

    for method in ("hra", "loha", "loha-large", "bone", "lora"):
        config = METHODS[method](target_modules=["0", "1"])
        reference = get_peft_model(tiny(), copy.deepcopy(config))
        model = get_peft_model(spread(tiny(), {"0": "colwise", "1": "rowwise"}), config)
        change(reference, model)
        x = drawn(5, 6).requires_grad_()
        for a, b in zip(backward(model, x), backward(reference, x), strict=True):
            close(a, b)
        with torch.no_grad():
            y = model(x)
            model.merge_adapter()
            close(model(x), y)


@case
def trained_copies_are_refused() -> None:
    with pytest.raises(HalotuneError, match="modules_to_save: 'head' is tensor-parallel"):
        get_peft_model(parallel(), HRAConfig(target_modules=["q"], modules_to_save=["head"]))


@case
def lengths_of_cut_rows_are_refused() -> None:
    config = LoHaConfig(r=2, weight_decompose=True, target_modules=["q", "o"])
    with pytest.raises(HalotuneError, match=r"o: each process holds some columns.*lengths of whole ones"):
        get_peft_model(parallel(), config)
    agree(*pair(LoHaConfig(r=2, weight_decompose=True, target_modules=["q", "gate_up", "head"])))


@case
def all_processes_begin_alike() -> None:
    torch.manual_seed(dist.get_rank())
    model = get_peft_model(parallel(), HRAConfig(target_modules=["q", "o"]))
    for p in trained(model).values():
        theirs = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, p.detach())
        assert all(torch.equal(p, t) for t in theirs)


def everywhere(method: str, **kwargs: Any) -> Any:
    return METHODS[method](target_modules=list(STYLES), **kwargs)


@case
def merging() -> None:
    for method in METHODS:
        reference, model = pair(everywhere(method))
        x = sample(reference)
        with torch.no_grad():
            before, y = model(x), reference(x)
            stored = {n: p.to_local().clone() for n, p in model.named_parameters() if hasattr(p, "to_local")}
            ours, theirs = model.merge_adapter(), reference.merge_adapter()
            close(model(x), y, 1e-4)
            assert str(ours) == str(theirs), f"{ours}\n{theirs}"
            model.unmerge_adapter()
            assert torch.equal(model(x), before)
            for n, p in model.named_parameters():
                assert n not in stored or torch.equal(p.to_local(), stored[n])
            merged = model.merge_and_unload()
            close(merged(x), y, 1e-4)


@contextmanager
def shared_folder() -> Iterator[Path]:
    made = [TemporaryDirectory() if dist.get_rank() == 0 else None]
    path = [made[0].name if made[0] else ""]
    dist.broadcast_object_list(path)
    yield Path(path[0])
    dist.barrier()
    if made[0]:
        made[0].cleanup()


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@case
def files() -> None:
    for method in METHODS:
        reference, model = pair(everywhere(method))
        x = sample(reference)
        with shared_folder() as folder, torch.no_grad():
            if dist.get_rank() == 0:
                reference.save_pretrained(folder / "one")
                model.save_pretrained(folder / "rank 0 alone")
            model.save_pretrained(folder / "all")
            dist.barrier()
            assert content(folder / "one") == content(folder / "all") == content(folder / "rank 0 alone")
            loaded = PeftModel.from_pretrained(parallel(), folder / "one")
            assert torch.equal(loaded(x), model(x))
            if method not in ("bat", "oft", "oft-coft", "oft-shared"):
                model.export("lora", folder / f"lora{dist.get_rank()}")
                reference.export("lora", folder / f"own{dist.get_rank()}")
                exported = PeftModel.from_pretrained(parallel(), folder / f"lora{dist.get_rank()}")
                close(exported(x), reference(x), 1e-4)
                assert content(folder / f"lora{dist.get_rank()}") == content(folder / f"own{dist.get_rank()}")


@case
def several_adapters() -> None:
    both: list[PeftModel] = []
    for model in (plain(), parallel()):
        both.append(get_peft_model(model, HRAConfig(r=4, target_modules=["q", "o", "head"]), adapter_name="a"))
        both[-1].add_adapter("b", BoneConfig(r=4, init_weights="bat", target_modules=["o", "down", "gate_up"]))
        both[-1].add_adapter("c", LoraConfig(r=2, target_modules=["q", "o", "split"]))
        both[-1].base_model.set_adapter(["a", "b", "c"])
    reference, model = both
    change(reference, model)
    agree(reference, model)
    for m in both:
        m.base_model.set_adapter(["c", "a"])
        m.set_scale("a", 0.5)
    agree(reference, model)
    for m in both:
        m.set_adapter("b")
    agree(reference, model)
    x = sample(reference)
    with torch.no_grad():
        with model.disable_adapter(), reference.disable_adapter():
            close(model(x), reference(x))
        names = ["a", "__base__", "c"]
        close(model(x, adapter_names=names), reference(x, adapter_names=names))


@case
def training_in_every_way() -> None:
    for method in ("hra", "loha", "loha-large", "bone", "bat", "oft", "lora"):
        reference, model = pair(everywhere(method))
        model.base_model.model.checkpointed = True
        agree(reference, model)
        model.base_model.model.checkpointed = False
        for m in (reference, model):
            m.set_adapter_form("weights")
        agree(reference, model)
        with torch.autocast(device(), torch.bfloat16):
            agree(reference, model, tolerance=0.1)


@case
def steps() -> None:
    """Clipped to a norm, with an optimizer that knows nothing of it: all processes stay alike."""
    for method in ("hra", "bat", "lora"):
        reference, model = pair(everywhere(method))
        optimizers = [torch.optim.AdamW(trained(m).values(), lr=1e-2) for m in (reference, model)]
        for step in range(4):
            for m, optimizer in zip((reference, model), optimizers, strict=True):
                backward(m, sample(reference, seed=step))
                torch.nn.utils.clip_grad_norm_(trained(m).values(), 1e-2)
                optimizer.step()
        for name, p in trained(model).items():
            close(p, trained(reference)[name], 1e-3)
            theirs = [torch.empty_like(p) for _ in range(dist.get_world_size())]
            dist.all_gather(theirs, p.detach())
            assert all(torch.equal(p, t) for t in theirs), name


@case
def dropout() -> None:
    """Masks are those of one process, and the generators of all go on alike."""
    configs = (
        LoraConfig(r=3, lora_dropout=0.4, target_modules=list(STYLES)),
        MissConfig(r=4, miss_dropout=0.4, target_modules=list(STYLES)),
        LoHaConfig(r=2, rank_dropout=0.4, module_dropout=0.2, target_modules=list(STYLES)),
        LoHaConfig(r=12, rank_dropout=0.4, target_modules=list(STYLES)),
        OFTConfig(oft_block_size=2, module_dropout=0.4, target_modules=["q", "gate_up", "head"]),
    )
    for config in configs:
        reference, model = pair(config, uneven=True)
        reference.train(), model.train()
        x, found = sample(reference), []
        for m in (reference, model):
            torch.manual_seed(5)
            found.append([*backward(m, x), torch.rand(3)])
        for a, b in zip(*found, strict=True):
            close(a, b)


@case
def penalties() -> None:
    reference, model = pair(HRAConfig(r=4, orthogonality_weight=0.1, target_modules=list(STYLES)))
    x = sample(reference)
    for m in (reference, model):
        m.zero_grad()
        (m(x).square().mean() + m.penalty()).backward()
    for a, b in zip(trained(model).values(), trained(reference).values(), strict=True):
        close(a.grad, b.grad)  # type: ignore[arg-type]


@case
def layers_alone_and_second_derivatives() -> None:
    for method in METHODS:
        reference, model = pair(METHODS[method](target_modules=["q"]))
        x = sample(reference)
        found = []
        for m in (reference, model):
            layer = m.base_model.model.q
            y = layer(x)
            pieces = y.chunk(dist.get_world_size(), -1) if m is reference else None
            y = pieces[dist.get_rank()] if pieces else y
            found.append(y)
        close(found[1], found[0])


@case
def biases() -> None:
    reference, model = pair(LoraConfig(r=2, bias="all", target_modules=list(STYLES)))
    agree(reference, model)
    with shared_folder() as folder:
        reference.save_pretrained(folder / f"one{dist.get_rank()}")
        model.save_pretrained(folder / "all")
        dist.barrier()
        assert content(folder / f"one{dist.get_rank()}") == content(folder / "all")


@case
def combined() -> None:
    reference, model = pair(HRAConfig(r=2, target_modules=["q", "o"]))
    for m in (reference, model):
        m.add_weighted_adapter(["default"], [0.5], "of_half", combination_type="lora")
        m.set_adapter("of_half")
    agree(reference, model)


class LayersSend(TorchDispatchMode):
    """Counts the numbers that DTensor's collectives sum. Adapters prepare alone inside it, as under any such mode."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops._c10d_functional.all_reduce.default:
            self.sizes.append(args[0].numel())
        return function(*args, **(kwargs or {}))


@contextmanager
def adapters_send() -> Iterator[list[int]]:
    """The numbers that adapters' own messages sum."""
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        own = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda t, *args, **kwargs: (sizes.append(t.numel()), own(t, *args, **kwargs)))
        yield sizes


class Block(nn.Module):
    """The layers of a block of a language model, all of width d."""

    def __init__(self, d: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            self.register_module(name, nn.Linear(d, d, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.k(x) * self.v(x))
        return x + self.down(self.gate(x) * self.up(x))


@case
def what_adapters_send() -> None:
    """With r ≤ 0.02 d and 4 d tokens at most 2 % of what the layers send."""
    d, r = 208, 4
    styles = {n: "rowwise" if n in ("o", "down") else "colwise" for n, _ in Block(d).named_children()}
    x = drawn(4 * d + 1, d) / 4
    tokens, large = r * len(x), x.numel()
    sums_of_z = {HRAConfig: 4}  # forward and backward, of both row-parallel layers
    for config in (
        HRAConfig(r=r),
        BoneConfig(r=r),
        BoneConfig(r=r, init_weights="bat"),
        OFTConfig(oft_block_size=r),
        LoraConfig(r=r),
        LoHaConfig(r=r),
    ):
        config.target_modules = list(styles)
        model = get_peft_model(spread(Block(d), styles), config)
        change(model)
        with LayersSend() as layers:
            model(x.clone().requires_grad_()).sum().backward()
        assert layers.sizes == [large] * 7  # as without adapters: forward of two layers, backward of five
        with adapters_send() as sizes:
            model(x.clone().requires_grad_()).sum().backward()
        assert sizes.count(tokens) == sums_of_z.get(type(config), 0)
        gradients = [n for n in sizes if n != tokens]
        assert sum(gradients) == sum(p.numel() for p in trained(model).values())
        assert len(gradients) == 2  # of all column-parallel layers together, and of all row-parallel ones
        assert sum(sizes) <= 0.02 * sum(layers.sizes)
        with torch.no_grad(), adapters_send() as sizes:
            model(x)
        assert sizes.count(tokens) == sums_of_z.get(type(config), 0) // 2


@case
def with_fsdp() -> None:
    """Two groups of data-parallel processes, in each of which two are tensor-parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh(device(), (2, 2), mesh_dim_names=("fsdp", "tp"))
    for method in METHODS:
        reference = get_peft_model(plain(), everywhere(method))
        model = get_peft_model(parallel(mesh=mesh["tp"]), everywhere(method))
        change(reference, model)
        inner = model.base_model.model
        for part in (inner.o, inner.gate_up.adapters, inner.down.base_layer, model):
            if part is not inner.gate_up.adapters:
                fully_shard(part, mesh=mesh["fsdp"])
        xs = [sample(reference, seed) for seed in (1, 2)]
        (sum(reference(x).square().mean() for x in xs) / 2).backward()
        for _ in range(2):
            model.zero_grad()
            y = model(xs[mesh.get_local_rank("fsdp")])
            y.square().mean().backward()
            close(y, reference(xs[mesh.get_local_rank("fsdp")]))
            for name, p in trained(model).items():
                close(p.grad, trained(reference)[name].grad)  # type: ignore[arg-type]
        torch.nn.utils.clip_grad_norm_(trained(model).values(), 1.0)


@case
def torchs_own_styles() -> None:
    """`parallelize_module`, with sequences cut between layers; DTensors between layers; a whole weight on DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    n = dist.get_world_size()
    mesh = init_device_mesh(device(), (n,))
    for method in METHODS:
        model = plain()
        parallelize_module(
            model,
            mesh,
            {
                "q": ColwiseParallel(input_layouts=Split(1)),
                "o": RowwiseParallel(output_layouts=Split(1)),
                "gathered": ColwiseParallel(input_layouts=Split(1), use_local_output=False),
                "split": RowwiseParallel(output_layouts=Replicate(), use_local_output=False),
            },
        )
        names = ["q", "o", "gathered", "split"]
        both = [get_peft_model(m, METHODS[method](target_modules=names)) for m in (plain(), model)]
        change(*both)
        x = drawn(3, 2 * n, 16)
        found = []
        for m, t in zip(both, (x, x.chunk(n, 1)[dist.get_rank()]), strict=True):
            inner = m.base_model.model
            y = inner.split(torch.tanh(inner.gathered(inner.o(torch.tanh(inner.q(t))))))
            y = y.full_tensor() if isinstance(y, DTensor) else y
            y.square().mean().backward()
            found.append(y)
        close(found[1], found[0])
        for a, b in zip(trained(both[1]).values(), trained(both[0]).values(), strict=True):
            close(a.grad, b.grad)  # type: ignore[arg-type]


@case
def a_language_model() -> None:
    """transformers' own loading, tied embeddings, an output layer that gathers, generation, and back to one process."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with shared_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(vocab_size=60, head_dim=8, tie_word_embeddings=True, **sizes)).save_pretrained(folder)
        dist.barrier()
        for method in ("hra", "loha", "bone", "bat", "oft", "lora"):
            torch.manual_seed(0)
            reference, model = (
                get_peft_model(m, METHODS[method](target_modules=names, task_type="CAUSAL_LM"))
                for m in (
                    LlamaForCausalLM.from_pretrained(folder),
                    LlamaForCausalLM.from_pretrained(
                        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size())
                    ),
                )
            )
            change(reference, model)
            ids = (10 * drawn(2, 7)).long().abs() + 1
            losses = [m(input_ids=ids, labels=ids).loss for m in (reference, model)]
            close(losses[1], losses[0])
            for loss in losses:
                loss.backward()
            for a, b in zip(trained(model).values(), trained(reference).values(), strict=True):
                close(a.grad, b.grad, 1e-4)  # type: ignore[arg-type]
            prompt = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
            expected = reference.generate(**prompt)
            assert torch.equal(model.generate(**prompt), expected)
            model.save_pretrained(folder / f"tp-{method}")
            reference.save_pretrained(folder / f"one{dist.get_rank()}-{method}")
            dist.barrier()  # the other process may be writing still
            assert content(folder / f"tp-{method}").keys() == content(folder / f"one{dist.get_rank()}-{method}").keys()
            assert content(folder / f"tp-{method}") == content(folder / f"one{dist.get_rank()}-{method}")
            logits = reference(ids).logits
            merged = model.merge_and_unload()
            with torch.no_grad():
                close(merged(ids).logits, logits, 1e-4)


LARGE = {"merging", "files", "training_in_every_way", "dropout", "steps", "a_language_model"}  # at two alone, to save time


def names_for(processes: int) -> list[str]:
    return [name for name in CASES if processes == 2 or name not in LARGE]


def run_all(rank: int, names: list[str]) -> dict[str, str]:
    failed = {}
    torch.set_default_device(device())
    for name in names:
        try:
            CASES[name]()
        except Exception as e:
            failed[name] = "".join(traceback.format_exception(e)[-6:])
    return failed


@pytest.fixture(scope="module")
def failures() -> Callable[[int], list[dict[str, str]]]:
    """For each process of as many, the cases that failed there, and how."""
    return cache(lambda processes: spawn(processes, run_all, names_for(processes)))


@pytest.mark.parametrize(("processes", "name"), [(n, name) for n in (2, 4) for name in names_for(n)])
def test_as_in_one_process(processes, name, failures):
    for failed in failures(processes):
        if message := failed.get(name):
            pytest.fail(message)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_on_gpus():
    processes = 4 if torch.cuda.device_count() > 3 else 2
    assert not any(spawn(processes, run_all, names_for(processes), backend="nccl", timeout=600))


if __name__ == "__main__":  # python -m tests.distributed.test_tensor_parallel 2,4 [part of a name]
    for n in sys.argv[1].split(","):
        chosen = [name for name in CASES if "".join(sys.argv[2:]) in name]
        backend = "nccl" if torch.cuda.device_count() >= int(n) else "gloo"
        for rank, failed in enumerate(spawn(int(n), run_all, chosen, backend=backend, timeout=600)):
            for name, message in failed.items():
                print(f"--- {n} processes, rank {rank}: {name}\n{message}")
