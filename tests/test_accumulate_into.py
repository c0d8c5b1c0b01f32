"""`accumulate_into`: the gradient of the head added to a main gradient in forward. And `logits_dtype` on a CPU."""

import pytest
import torch

import fastpref as fp
from fastpref import arguments, cpu

S, T, H, V = 6, 40, 32, 517


def make(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(S, T, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (S, T), generator=generator)
    targets[:, ::3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("budget", [None, 300_000, 150_000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adds_what_autograd_would_have_brought(dtype, budget):
    hidden, weight, targets = make(dtype)
    options = dict(ref_logps=torch.zeros(S), memory_budget=budget)
    fp.linear_preference_loss(hidden, weight, targets, **options).loss.backward()
    gradient, hidden_gradient = weight.grad.double(), hidden.grad
    weight.grad = hidden.grad = None
    into = torch.full((V, H), 0.25)
    fp.linear_preference_loss(hidden, weight, targets, accumulate_into=into, **options).loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, hidden_gradient)
    error = (into.double() - 0.25 - gradient).norm() / gradient.norm()
    assert error < (5e-6 if dtype == torch.float32 else 3e-3)


def test_two_micro_batches_add_up_in_fp32():
    hidden, weight, targets = make(torch.float32)
    pairs = [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])]
    totals = fp.Totals(S, int((targets != -100).sum()), int((targets[: S // 2] != -100).sum()))
    into = torch.zeros(V, H)
    for index in pairs:
        fp.linear_preference_loss(
            hidden[index],
            weight,
            targets[index],
            ref_logps=torch.zeros(len(index)),
            totals=totals,
            accumulate_into=into,
        )
    fp.linear_preference_loss(hidden, weight, targets, ref_logps=torch.zeros(S)).loss.backward()
    torch.testing.assert_close(into, weight.grad, rtol=1e-4, atol=1e-7)


def test_an_upstream_gradient_it_cannot_honour_is_refused():
    hidden, weight, targets = make(torch.float32)
    out = fp.linear_preference_loss(
        hidden, weight, targets, ref_logps=torch.zeros(S), accumulate_into=torch.zeros(V, H)
    )
    with pytest.raises(RuntimeError, match="accumulate_into takes only 1"):
        (out.loss / 2).backward()


@pytest.mark.parametrize(
    "into, said",
    [
        (torch.zeros(V, H + 1), "shape"),
        (torch.zeros(V, H, dtype=torch.bfloat16), "float32"),
        (torch.zeros(H, V).t(), "contiguous"),
        (torch.zeros(V, H, requires_grad=True), "requires grad"),
    ],
)
def test_errors(into, said):
    hidden, weight, targets = make(torch.float32)
    with pytest.raises((ValueError, TypeError), match=f"accumulate_into.*{said}"):
        fp.linear_preference_loss(hidden, weight, targets, ref_logps=torch.zeros(S), accumulate_into=into)
    with pytest.raises(ValueError, match="accumulate_into.*callable"):
        fp.linear_preference_loss(
            hidden, weight, targets, loss=lambda seq: seq.logps.sum(), accumulate_into=torch.zeros(V, H)
        )


def test_logits_dtype(monkeypatch):
    hidden, weight, targets = make(torch.bfloat16)
    default = fp.linear_logps(hidden, weight, targets)
    assert torch.equal(fp.linear_logps(hidden, weight, targets, logits_dtype="bf16"), default)
    wide = fp.linear_logps(hidden, weight, targets, logits_dtype="fp32")
    assert wide.dtype == torch.float32 and torch.equal(wide, fp.linear_logps(hidden.float(), weight.float(), targets))
    assert not torch.equal(wide, default)
    # The default of a CPU that multiplies slower in bf16; what autocast rounds stays rounded.
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fp.linear_logps(hidden.float(), weight.float(), targets)
    monkeypatch.setattr(arguments, "SLOW_DTYPES", frozenset([torch.bfloat16]))
    assert torch.equal(fp.linear_logps(hidden, weight, targets), wide)
    assert torch.equal(fp.linear_logps(hidden, weight, targets, logits_dtype="bf16"), default)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp.linear_logps(hidden.float(), weight.float(), targets), rounded)
    with pytest.raises(ValueError, match="logits_dtype is 'fp16'; it takes None or fp32 or bf16"):
        fp.linear_logps(hidden, weight, targets, logits_dtype="fp16")
    wide64 = [x.detach().double() for x in (hidden, weight)]
    with pytest.raises(ValueError, match="logits_dtype is 'fp32'; it takes None for torch.float64"):
        fp.linear_logps(*wide64, targets, logits_dtype="fp32")
    with pytest.raises(ValueError, match="logits_dtype is 'fp8'"):
        fp.linear_preference_loss(hidden, weight, targets, loss="sft", logits_dtype="fp8")


@pytest.mark.parametrize("cpuinfo, slow", [
    ("vendor_id\t: GenuineIntel\nflags\t\t: avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile\n", set()),
    ("vendor_id\t: GenuineIntel\nflags\t\t: avx2 avx512f avx512_bf16 avx512_fp16\n", {torch.bfloat16}),
    ("vendor_id\t: AuthenticAMD\nflags\t\t: avx2 avx512f avx512_bf16\n", {torch.float16}),
    ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2\n", {torch.bfloat16, torch.float16}),
    ("processor\t: 0\nFeatures\t: asimd bf16\n", set()), ("", set()),
], ids=["Xeon with AMX", "without", "Zen 4", "Zen 3", "ARM", "no Linux"])
def test_where_a_cpu_multiplies_slower_than_in_fp32(cpuinfo, slow):
    assert cpu.slow_dtypes(cpu.cpuinfo(cpuinfo)) == slow


def test_a_cpus_name_says_whether_it_has_amx():
    xeon = "model name\t: Some Xeon\nflags\t\t: avx2 {}\n"
    names = [cpu.cpu_name(cpu.cpuinfo(xeon.format(flag))) for flag in ("amx_bf16", "")]
    assert names == ["Some Xeon (AMX)", "Some Xeon (no AMX)"]
    assert "AMX" not in cpu.cpu_name(cpu.cpuinfo("Features\t: asimd bf16\n"))
