"""Attention over packed sequences whose prompts are read once: no padding, no prompt computed twice.

    rows of the trunk   p p p c c c c r r r | p p c c r r r | ...       [N], one group of sequences after another
    segment 0           queries p c,  keys p c                          causal
    segment 1           queries r,    keys p r                          causal, aligned at the bottom right

A prompt and its R responses are R segments: the first response attends as if it stood alone with the prompt, every
further one to the prompt's keys and its own. Positions go on from the prompt in each. So every hidden row is the one
that the padded, unshared forward computes; where a prompt is as long as r responses, a pair is r + 2 responses of work
instead of 2r + 2. The keys of all segments are gathered by cutting the rows into pieces and joining them again, a
shared prompt several times: its gradient is then a sum of slices in a fixed order, where an index would need atomics.

Any variable-length kernel with bottom-right causal alignment computes the segments. Here: flash-attn >= 2.6, else
torch's `varlen_attn` (torch >= 2.11, CUDA sm_80 or newer), else torch's scaled_dot_product_attention, segment by
segment, on any device and in any dtype.

Transformers models take it under the name "fastpref" through their AttentionInterface: `replace_attention`.

Prior art: prompts shared by a pair with a FlexAttention mask, arXiv 2410.20305; as two segments of a variable-length
kernel, github.com/li-plus/flash-preference.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from fastpref.errors import first_line

NAME = "fastpref"
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionPlan:
    """Which of N packed rows attend to which, in G segments. Counts are on the host, so that nothing synchronises; only
    the offsets that kernels read are tensors.
    """

    positions: tuple[int, ...]  # [N], of each row in its sequence
    pieces: tuple[int, ...]  # lengths of the pieces that the rows are cut into
    gather: tuple[int, ...]  # indices of the pieces, in the order of the keys; (): the keys are the rows as they are
    q_lengths: tuple[int, ...]  # [G], their sum is N
    k_lengths: tuple[int, ...]  # [G], each at least its q_length
    cu_seqlens_q: Tensor  # [G + 1] int32
    cu_seqlens_k: Tensor  # [G + 1] int32

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> AttentionPlan:
        """The plan of groups (tokens of a prompt, tokens of each of its responses), which lie one after another, each
        as its prompt and then its responses. A sequence that shares nothing is a group of one response.

        Raises ValueError for no group, a group without response, and lengths below 1.
        """
        if not groups:
            raise ValueError("groups: got none, expected at least one (prompt length, response lengths)")
        positions: list[int] = []
        pieces: list[int] = []
        gather: list[int] = []
        q_lengths: list[int] = []
        k_lengths: list[int] = []
        for prompt, responses in groups:
            if prompt < 1 or not responses or min(responses) < 1:
                raise ValueError(f"groups: got {(prompt, tuple(responses))}, expected a prompt and responses of >= 1")
            head = len(pieces)
            for i, response in enumerate(responses):
                start = prompt if i else 0
                positions += range(start, prompt + response)
                gather += [head, head + 1 + i]
                q_lengths.append(prompt + response - start)
                k_lengths.append(prompt + response)
            pieces += [prompt, *responses]
        if q_lengths == k_lengths:
            pieces, gather = [len(positions)], []
        return cls(
            tuple(positions), tuple(pieces), tuple(gather), tuple(q_lengths), tuple(k_lengths),
            torch.tensor([0, *accumulate(q_lengths)], dtype=torch.int32),
            torch.tensor([0, *accumulate(k_lengths)], dtype=torch.int32),
        )

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> AttentionPlan:
        """The plan whose `lengths` these are."""
        groups: list[list[tuple[int, int]]] = []
        for queries, keys in zip(lengths[::2], lengths[1::2], strict=True):
            if queries == keys:  # begins with its own prompt
                groups.append([])
            groups[-1].append((queries, keys))
        # a prompt that nobody shares may end anywhere
        prompts = [(group[-1][1] - group[-1][0]) or group[0][1] - 1 for group in groups]
        return cls.of([(p, [keys - p for _, keys in group]) for p, group in zip(prompts, groups, strict=True)])

    @cached_property
    def lengths(self) -> Tensor:
        """[2G] int64 on the host: q_length and k_length of each segment in turn. What compiled layers take in place of
        the plan, whose numbers would be constants of their code."""
        return torch.tensor([*chain.from_iterable(zip(self.q_lengths, self.k_lengths, strict=True))])

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.positions)

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan with its offsets on `device`; the host does not wait for the copy."""
        device = torch.device(device)

        def moved(offsets: Tensor) -> Tensor:
            pinned = offsets.pin_memory() if device.type == "cuda" and offsets.device.type == "cpu" else offsets
            return pinned.to(device, non_blocking=True)

        return replace(self, cu_seqlens_q=moved(self.cu_seqlens_q), cu_seqlens_k=moved(self.cu_seqlens_k))

    def keys(self, rows: Tensor) -> Tensor:
        """[N, ...] -> [sum of k_lengths, ...]: the rows that each segment attends to, segment after segment."""
        if not self.gather:
            return rows
        pieces = rows.split(list(self.pieces))
        return torch.cat([pieces[i] for i in self.gather])


# ---- the function ----------------------------------------------------------------------------------------------------


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of packed sequences that share prompts.

    In each segment, for the query at position i and the keys j <= i of its own sequence, its prompt included,

        out_i = sum_j softmax_j(cap(scale * <q_i, k_j>)) v_j,      cap(x) = softcap * tanh(x / softcap), or x

    query: [N, Hq, D]; key: [N, Hkv, D]; value: [N, Hkv, Dv]; rows as the plan lays them out, Hq a multiple of Hkv.
    scale: 1 / sqrt(D) if None. window: only the last `window` keys, the query's own among them.

    Returns [N, Hq, Dv]; differentiable in query, key and value. Under autocast it works in autocast's dtype.

    Raises ValueError for rows that are not the plan's, heads that do not divide, window below 1, softcap not above 0.
    """
    for name, given, ok, takes in (
        ("window", window, window is None or window >= 1, "at least 1"),
        ("softcap", softcap, softcap is None or softcap > 0, "above 0"),
    ):
        if not ok:
            raise ValueError(f"{name}: got {given}, expected {takes}")
    if query.shape[0] != plan.num_tokens or key.shape[0] != plan.num_tokens or value.shape[0] != plan.num_tokens:
        shapes = f"{query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        raise ValueError(f"query, key, value: got {shapes} rows, expected the plan's {plan.num_tokens}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query: got {query.shape[1]} heads, expected a multiple of key's {key.shape[1]}")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= max(plan.k_lengths):
        window = None
    run = {"flash_attn": _run_flash_attn, "varlen_attn": _run_varlen_attn, "torch": _run_torch}
    name = backend(query.device, query.dtype, query.shape[-1], softcap)
    return run[name](query, plan.keys(key), plan.keys(value), plan, scale, window, softcap)


def backend(device: torch.device, dtype: torch.dtype, head_dim: int = 64, softcap: float | None = None) -> str:
    """What computes such a call: "flash_attn", "varlen_attn" or "torch"."""
    if device.type != "cuda" or dtype not in HALF or head_dim % 8 or head_dim > 256:
        return "torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) or torch.version.hip:
        return "torch"
    if _flash_attn() is not None:
        return "flash_attn"
    # Torch's kernel has a backward for heads wider than 192 only where shared memory is large.
    too_wide = head_dim > 192 and capability not in ((8, 0), (9, 0), (10, 0))
    return "torch" if softcap is not None or too_wide or _varlen_attn() is None else "varlen_attn"


@lru_cache(maxsize=1)
def _flash_attn() -> Callable[..., Tensor] | None:
    """From 2.6 on: causal masks are aligned at the bottom right (2.1), windows (2.3) and soft caps (2.6) are there."""
    try:
        import flash_attn
    except (ImportError, OSError):  # OSError: built for another torch
        return None
    version = tuple(map(int, re.findall(r"\d+", flash_attn.__version__)[:2]))
    return flash_attn.flash_attn_varlen_func if version >= (2, 6) else None


@lru_cache(maxsize=1)
def _varlen_attn() -> tuple[Callable[..., Any], bool] | None:
    """And whether it takes repeats key than query heads. That of torch 2.10 has neither scale nor window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in takes) if {"scale", "window_size"} <= takes.keys() else None


def _run_flash_attn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, window: int | None,
                    softcap: float | None) -> Tensor:
    function = _flash_attn()
    assert function is not None
    out = function(
        q, k, _as_wide(v, q), plan.cu_seqlens_q, plan.cu_seqlens_k, max(plan.q_lengths), max(plan.k_lengths),
        dropout_p=0.0, softmax_scale=scale, causal=True, softcap=softcap or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return out[..., : v.shape[-1]]


def _run_varlen_attn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, window: int | None,
                     softcap: float | None) -> Tensor:
    found = _varlen_attn()
    assert found is not None and softcap is None
    function, takes_gqa = found
    repeats = q.shape[1] // k.shape[1]
    options: dict[str, Any] = {"enable_gqa": repeats > 1} if takes_gqa else {}
    if repeats > 1 and not takes_gqa:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    out: Tensor = function(
        q, k, _as_wide(v, q), plan.cu_seqlens_q, plan.cu_seqlens_k, max(plan.q_lengths), max(plan.k_lengths),
        scale=scale, window_size=(-1 if window is None else window - 1, 0), **options,
    )
    return out[..., : v.shape[-1]]


def _as_wide(value: Tensor, query: Tensor) -> Tensor:
    """Kernels want one head size for all (MLA has narrower values)."""
    missing = query.shape[-1] - value.shape[-1]
    return F.pad(value, (0, missing)) if missing else value


def _run_torch(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, window: int | None,
               softcap: float | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    parts = zip(q.split(list(plan.q_lengths)), *(x.split(list(plan.k_lengths)) for x in (k, v)), strict=True)
    found = []
    for part in parts:
        qs, ks, vs = (x.transpose(0, 1)[None] for x in part)  # [1, heads, tokens, D]
        if repeats > 1:  # not enable_gqa: only some devices and versions have a fused kernel for it
            ks, vs = ks.repeat_interleave(repeats, dim=1), vs.repeat_interleave(repeats, dim=1)
        queries, keys = qs.shape[2], ks.shape[2]
        mask = None
        if queries < keys or softcap is not None or (window is not None and window < keys):
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
            if window is not None:
                mask = mask.triu(keys - queries - window + 1)
        if softcap is None:
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None, scale=scale)
        else:
            assert mask is not None
            scores = softcap * torch.tanh((qs @ ks.transpose(2, 3)) * (scale / softcap))
            scores = scores.float() if scores.dtype in HALF else scores
            out = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(vs.dtype) @ vs
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


# ---- compiled layers -------------------------------------------------------------------------------------------------

_plan_of = lru_cache(maxsize=8)(lambda lengths, device: AttentionPlan.of_lengths(lengths).to(device))


@library.custom_op("fastpref::packed_attention", mutates_args=())
def _compiled_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:
    """`packed_attention` as one node of a graph, of any kernel and for any plan of as many rows."""
    plan = _plan_of(tuple(lengths.tolist()), query.device)
    return packed_attention(query, key, value, plan, scale=scale, window=window, softcap=softcap).contiguous()


@_compiled_attention.register_fake
def _(query, key, value, lengths, scale, window, softcap):  # type: ignore[no-untyped-def]
    return value.new_empty(query.shape[0], query.shape[1], value.shape[2])


@library.custom_op("fastpref::packed_attention_backward", mutates_args=())
def _compiled_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """By autograd over the forward pass, made once more: what its kernel would keep is of each kernel another kind."""
    plan = _plan_of(tuple(lengths.tolist()), query.device)
    # Ops run below autograd, where nothing is recorded: its keys, and no others (autocast's), come back.
    keys, left_out = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        left_out = left_out.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(keys, left_out), torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
        out = packed_attention(q, k, v, plan, scale=scale, window=window, softcap=softcap)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), gradient)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_compiled_attention_backward.register_fake
def _(gradient, query, key, value, lengths, scale, window, softcap):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.fastpref.packed_attention_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None


_compiled_attention.register_autograd(_backward, setup_context=_keep)


# ---- transformers ----------------------------------------------------------------------------------------------------

# Tensors that models hand on to every attention function and that say nothing here: the positions are the plan's.
_OF_NO_CONCERN = ("position_ids", "cache_position", "position_embeddings")
_LAYER_TYPES = ("attention", "full_attention", "sliding_attention")


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attention_plan: AttentionPlan | Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, N, D], key and value [1, Hkv, N, D] -> [1, N, Hq, Dv].
    attention_plan: compiled layers take its `lengths`."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(attention_plan, Tensor):  # `replace_attention` has tried the checks below on this very model
        kind = q.device.type  # autocast knows no meta device, where layers are tried
        if kind != "meta" and torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        out = torch.ops.fastpref.packed_attention(q, k, v, attention_plan, scaling, sliding_window, softcap)
        return out[None], None
    what = type(module).__name__
    if attention_plan is None:
        raise ValueError(f"{what}: attention {NAME!r} takes packed batches, but no attention_plan reached it")
    if attention_mask is not None:
        raise ValueError(f"{what}: has an attention mask of its own, which packed batches have no room for")
    if dropout:
        raise ValueError(f"{what}: has attention dropout {dropout}; packed batches take 0")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{what}: does not attend causally, as packed batches do")
    for name, given in others.items():
        if isinstance(given, Tensor) and name not in _OF_NO_CONCERN:  # sinks, position biases, ...
            raise ValueError(f"{what}: its attention takes {name}, which packed batches do not know")
    types, place = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if types and place is not None and types[place] == "sliding_attention" and sliding_window is None:
        raise ValueError(f"{what}: attends within a window that it does not tell its attention function")
    out = packed_attention(q, k, v, attention_plan, scale=scaling, window=sliding_window, softcap=softcap)
    return out[None], None


def check_replaceable(model: Any) -> None:
    """What `replace_attention` can tell without running the model. Raises ValueError, one line."""
    what = type(model).__name__
    config = model.config.get_text_config()
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - {*_LAYER_TYPES})
    if getattr(config, "attention_chunk_size", None):
        unknown.append("chunked_attention")
    if unknown:
        raise ValueError(f"{what}: has {', '.join(unknown)} layers; packed batches take full and sliding attention")
    can = getattr(model, "_can_set_attn_implementation", lambda: model._supports_attention_backend)
    if not can():
        raise ValueError(f"{what}: its attention cannot be replaced, it does not come from AttentionInterface")


def attend_packed(model: Any) -> None:
    """What `replace_attention` does, unproven."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)


def replace_attention(model: Any, trunk: Any, compute_dtype: torch.dtype = torch.float32) -> str:
    """Lets a transformers model run packed batches: its trunk is then called as

        trunk(input_ids [1, N], position_ids=[1, N], attention_plan=plan, use_cache=False)

    and takes nothing else: no mask, no cache; `own_attention` gives it its own attention back for generation.

    model: a PreTrainedModel; trunk: what of it returns `last_hidden_state`; compute_dtype: of autocast. That packed
    sequences do not see each other and that no layer loses the plan is proven on a few tokens.

    Returns the name of the attention the model had. Raises ValueError, one line, and leaves the model as it was, where
    its attention cannot be replaced: one that is not taken from AttentionInterface, biases, sinks or chunks, layers
    with a state (Mamba, linear attention, convolutions), position embeddings that do not follow position_ids.
    """
    check_replaceable(model)
    what = type(model).__name__
    config = model.config.get_text_config()
    own = str(config._attn_implementation)
    training = model.training
    model.eval()
    try:
        parameter = next(model.parameters())
        contexts: list[Any] = [nullcontext()]
        if compute_dtype in HALF and parameter.dtype not in HALF:
            contexts.append(torch.autocast(parameter.device.type, dtype=compute_dtype))
        expected = []
        for context in contexts:
            with context:
                expected.append(_few_rows(trunk, packed=False))
        attend_packed(model)
        if config._attn_implementation != NAME:
            raise ValueError("it does not come from AttentionInterface")
        for context, rows in zip(contexts, expected, strict=True):
            with context:
                error = _largest_row_error(_few_rows(trunk, packed=True), rows)
            exact = context is contexts[0] and parameter.dtype not in HALF
            if not error < (5e-3 if exact else 0.2):  # a row that sees another sequence is off by far more
                raise ValueError(f"packed sequences give other hidden rows (relative difference {error:.1g})")
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: shapes that a layer of its own kind expects
        if config._attn_implementation == NAME:
            model.set_attn_implementation(own)
        reason = first_line(error).removeprefix(f"{what}: ")
        raise ValueError(f"{what}: its attention cannot be replaced: {reason}") from error
    finally:
        model.train(training)
    return own


@torch.no_grad()
def _few_rows(trunk: Any, *, packed: bool) -> Tensor:
    """[N, H] hidden rows of two groups of sequences, packed; or the same rows from each sequence alone."""
    embedding = trunk.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    groups = [(5, (4, 3, 2)), (2, (6, 4))]
    tokens = [
        [torch.randint(min(len(embedding), 1000), (n,), generator=generator) for n in (prompt, *responses)]
        for prompt, responses in groups
    ]
    device = embedding.device
    if not packed:
        alone = []
        for prompt, *responses in tokens:
            for i, response in enumerate(responses):
                ids = torch.cat((prompt, response))[None].to(device)
                hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
                alone.append(hidden[len(prompt) if i else 0 :])
        return torch.cat(alone).cpu().double()
    plan = AttentionPlan.of(groups).to(device)
    ids = torch.cat([part for group in tokens for part in group])[None].to(device)
    positions = torch.tensor([plan.positions], device=device)
    out = trunk(input_ids=ids, position_ids=positions, attention_plan=plan, use_cache=False)
    return out.last_hidden_state[0].cpu().double()  # MPS has no float64


def _largest_row_error(rows: Tensor, expected: Tensor) -> float:
    return float(((rows - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-6)).max())


@contextmanager
def own_attention(model: Any, own: str) -> Iterator[None]:
    """Gives a model back, for a while, the attention that `replace_attention` took: generation has cache and mask."""
    model.set_attn_implementation(own)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
