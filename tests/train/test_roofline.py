"""The roofline of a step, against arithmetic by hand and published rates."""

import pytest
from transformers import LlamaConfig, Qwen2Config

from fastpref import cli
from fastpref.train.roofline import EFFICIENCY, H100, Machine, Model, hidden_from, roofline_text, step


@pytest.fixture(scope="module")
def llama():
    return Model.of(LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ))


def test_the_counts_of_llama_8b(llama):
    per_layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert llama.linear == 32 * per_layer == 6_979_321_856
    assert llama.head == 128256 * 4096 and llama.hidden == 4096
    assert llama.trunk == llama.linear + llama.head + 65 * 4096  # embedding and norms
    assert llama.pair == 4 * 32 * 4096
    # in + out of q, k, v, o, gate, up, down; four times the residual stream; bf16
    assert llama.elementwise == 2 * 32 * (8192 + 2 * 5120 + 8192 + 2 * 18432 + 18432 + 4 * 4096) == 6_291_456


def test_a_tied_head_is_not_gathered_with_the_trunk():
    tiny = Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=True)
    found = Model.of(tiny)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128
    assert found.trunk == 2 * (layer + 64 + 2 * 32 + 2 * 64) + 64  # biases of q, k, v and norms, no embedding
    assert found.head == 64_000


def test_one_gpu_by_hand(llama):
    """16,384 tokens in one sequence: numbers worked out apart."""
    found = step(llama, 16384, 16384)
    flops, memory = 0.7 * 989e12, 0.7 * 3.35e12
    assert found.linear == pytest.approx(2 * 6_979_321_856 * 16384 * 4 / flops) == pytest.approx(1.3214, rel=1e-4)
    assert found.attention == pytest.approx(524288 * 16384 * 8192 * 4.5 / flops) == pytest.approx(0.4574, rel=1e-4)
    assert found.head == pytest.approx(0.074596, rel=1e-4)
    assert found.elementwise == pytest.approx(6_291_456 * 16384 * 4 / memory) == pytest.approx(0.17583, rel=1e-4)
    assert found.optimizer == pytest.approx(0.034244, rel=1e-4)
    assert found.gather == found.reduce == found.rows == found.exposed == 0
    assert found.seconds == pytest.approx(2.0635, rel=1e-4)
    assert found.mfu == pytest.approx(0.46495, rel=1e-4)  # the aim: 0.45
    assert step(llama, 16384, 16384, again=False).mfu == pytest.approx(0.60434, rel=1e-4)
    alone = step(llama, 16384, 16384, efficiency=1.0)
    assert alone.mfu == pytest.approx(found.mfu / EFFICIENCY) == pytest.approx(0.66421, rel=1e-4)


def test_wires_by_hand(llama):
    node, nodes = step(llama, 16384, 2048, 8), step(llama, 16384, 2048, 8, 32)
    assert node.gather == pytest.approx(4 * llama.trunk * 7 / 8 / 450e9 / 0.7) == pytest.approx(0.083388, rel=1e-4)
    assert node.reduce == node.gather and node.exposed == 0
    assert node.rows == pytest.approx(8 * 16384 * 4096 * 6 * 7 / 8 / 450e9 / 0.7)
    # 31 of 32 parts come over 8 cards of 50 GB/s, which is less than NVLink's 450 for 255 of 256
    assert nodes.gather == pytest.approx(4 * llama.trunk * 31 / 32 / 400e9 / 0.7) == pytest.approx(0.10386, rel=1e-4)
    assert nodes.rows == pytest.approx(0.35664, rel=1e-4) and nodes.seconds == pytest.approx(1.9858, rel=1e-4)
    few = hidden_from(llama, 2048, 8, 4)
    assert step(llama, few, 2048, 8, 4).exposed == 0 < step(llama, few - 2, 2048, 8, 4).exposed
    little = step(llama, few // 2, 2048, 8, 4)
    assert little.exposed == pytest.approx(little.gather + little.reduce - little.hiding)


TITAN = dict(length=8192, gpus=8, again=False, efficiency=1.0, sharded_head=False)


@pytest.mark.parametrize(("machine", "tokens", "nodes", "rate", "reached"), [
    (Machine("H100, 500 W, HBM2e", 989e12, 2.4e12, 450e9, 50e9), 16384, 1, 6667, 0.408),  # with torch.compile
    (Machine("H100, 500 W, HBM2e", 989e12, 2.4e12, 450e9, 50e9), 16384, 16, 6514, 0.399),
    (Machine("A100", 312e12, 2.04e12, 300e9, 25e9), 8192, 8, 2973, 0.528),
])
def test_published_rates_stay_below_the_roofs(llama, machine, tokens, nodes, rate, reached):
    """torchtitan's Llama 3.1 8B: the share of the roofs that its tokens/s a GPU come to."""
    found = step(llama, tokens, nodes=nodes, machine=machine, **TITAN)
    assert rate * found.seconds / tokens == pytest.approx(reached, abs=0.002)


def test_the_text_says_where_it_stops_scaling(llama, tmp_path, capsys):
    text = roofline_text("m", llama, 16384, 2048, 8, 4)
    assert "MFU 46.3%" in text and "9,813 tokens/s a GPU" in text and "70%" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["4", "32", "1669.7", "46.3%", "99.6%"] in rows and ["32", "256", "1985.8", "38.9%", "83.8%"] in rows
    assert "Below 80 % of one GPU's rate from 64 nodes on" in text
    assert max(map(len, text.splitlines())) <= 80
    shares = [float(row[-1][:-1]) for row in rows[5:12]]
    assert sum(shares) == pytest.approx(100, abs=0.4)

    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=256).save_pretrained(tmp_path)
    assert cli.main(["plan", "--gpus", "8", "--nodes", "4", "--model", str(tmp_path), "--length", "512"]) == 0
    assert "sequences of 512" in capsys.readouterr().out
    for arguments, said in (
        (["--model", str(tmp_path), "--nodes", "2"], "--gpus is missing"),
        (["--model", str(tmp_path), "--gpus", "0"], "--gpus is 0; it takes at least 1"),
        (["--gpus", "8", "--length", "5", "--hidden", "6", "--vocab", "7"], "--gpus: is for --model"),
        (["--model", str(tmp_path), "--gpu-gib", "8", "--length", "5"], "--length: --model tells it"),
    ):
        assert cli.main(["plan", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert H100.flops == 989e12
