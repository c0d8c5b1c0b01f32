"""The catalogue of what a run logs, for the report, the terminal and the docs; and numbers written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One value of metrics.jsonl: its name, what it is in a sentence, and its name in a line of the terminal."""

    name: str
    what: str
    unit: str = ""  # "share": between 0 and 1, shown in percent
    better: str = ""  # "higher" or "lower"; "": neither is
    short: str = ""

    @property
    def title(self) -> str:
        return self.name[:1].upper() + self.name[1:]

    @property
    def share(self) -> bool:
        return self.unit == "share"


# Of training (means over logging_steps) and of evaluations, under TRL's names where TRL has them.
# y_c, y_r: the chosen and the rejected response.
METRICS = {
    "exact_match": Metric("exact match, greedy", "held-out prompts whose greedy generation has the expected answer, "
                          "over all tasks; exact_match/TASK of each", "share", "higher", "exact match"),
    "rewards/accuracies": Metric(
        "reward accuracy", "pairs whose chosen response has the larger implicit reward; KTO: of all pairs of a "
        "desirable and an undesirable response", "share", "higher", "acc"),
    "rewards/margins": Metric("reward margin", "implicit reward of y_c less that of y_r; KTO: of the means", "",
                              "higher", "margin"),
    "accuracy": Metric("accuracy", "reward model: pairs whose chosen response has the larger reward",
                       "share", "higher", "acc"),
    "margin": Metric("reward margin", "reward model: reward of y_c less that of y_r", "", "higher", "margin"),
    "mean_reward": Metric("mean reward", "reward model: mean over all responses", short="mean reward"),
    "logps/chosen": Metric("chosen log-prob", "log π(y_c), mean over the pairs", "nats", short="chosen"),
    "logps/rejected": Metric("rejected log-prob", "log π(y_r), mean over the pairs", "nats", short="rejected"),
    "watch/chosen_change": Metric("chosen log-prob since the start", "mean of log π(y_c) - log π_start(y_c)", "nats",
                                  short="chosen change"),
    "watch/rejected_change": Metric("rejected log-prob since the start", "mean of log π(y_r) - log π_start(y_r)",
                                    "nats", short="rejected change"),
    "watch/chosen_fell": Metric("pairs whose chosen log-prob fell", "pairs whose chosen log-prob is more than 0.01 nat "
                                "below its start", "share", short="chosen fell"),
    "watch/length_correlation": Metric("correlation of margin and length", "Pearson correlation of the margin with "
                                       "|y_c| - |y_r|, over all pairs of the line", short="length corr."),
    "watch/kl": Metric("KL to the reference", "how far the policy is from the reference, a response, seen on the "
                       "data's responses", "nats", short="kl"),
    "kl": Metric("KL", "of fresh samples: how far the policy is from the reference, a response, k3 up to k1 = 0.25 "
                 "nats a token, k1 beyond; on other lines KTO's baseline, under TRL's name", "nats", short="baseline"),
    "loss": Metric("loss", "the loss, normalised over the global batch", "", "lower", "loss"),
    "logps": Metric("log-prob", "log-probs of the responses where there are no pairs, mean", "nats"),
    "rewards": Metric("reward", "implicit rewards where there are no pairs, mean"),
    "rewards/chosen": Metric("chosen reward", "implicit reward of y_c, β (log π(y_c) - log π_ref(y_c)) for DPO; "
                             "reward model: its reward"),
    "rewards/rejected": Metric("rejected reward", "the same of y_r"),
    "tail/active": Metric("active columns", "of tail: rank1: columns of dX and dW computed one by one", "share"),
    "tail/error": Metric("error of the tail", "of tail: rank1: norm of what is left out of the residuals, over theirs",
                         "", "lower"),
    # of the optimiser and the machine
    "epoch": Metric("epoch", "passes over the data so far"),
    "learning_rate": Metric("learning rate", "of the line's last step"),
    "grad_norm": Metric("gradient norm", "before clipping"),
    "num_tokens": Metric("tokens", "tokens trained on so far", "tokens"),
    "tokens_per_s": Metric("throughput", "tokens of the batches, prompts too", "tokens/s", "higher", "tok/s"),
    "scored_tokens_per_s": Metric("scored tokens", "tokens that reach the LM head", "tokens/s", "higher", "scored"),
    "saved_tokens_per_s": Metric("shared tokens", "of shared prompts: not computed twice", "tokens/s", "higher",
                                 "shared"),
    "mfu": Metric("model FLOP utilisation", "FLOP of the model over what the device can do", "share", "higher", "mfu"),
    "peak_memory_mib": Metric("peak memory", "on a GPU what torch has allocated at most; on a CPU the process", "MiB",
                              "lower"),
    "skipped_steps": Metric("skipped steps", "steps left out for NaN or infinite gradients, so far", "", "lower"),
}
SAMPLES = {  # of fresh samples
    "kl_k1": Metric("KL by k1", "mean over responses of Σ_t log π(y_t) - log π_ref(y_t)", "nats"),
    "kl_k3": Metric("KL by k3", "mean over responses of Σ_t r_t - 1 - log r_t, with r_t = π_ref(y_t) / π(y_t)", "nats"),
    "reward": Metric("reward", "mean score of the responses, where there is a scorer", "", "higher"),
    "samples": Metric("samples", "responses"),
    "not_scored": Metric("not scored", "responses that the scorer failed on", "", "lower"),
    "response_length": Metric("response length", "mean", "tokens"),
    "ended": Metric("ended", "responses that ended before sample_max_new_tokens", "share"),
    "seconds": Metric("seconds", "what this line took", "s"),
    "time_share": Metric("time share", "what all sampling so far took, of the training steps' time", "share"),
}
METRICS |= SAMPLES


def metric(key: str) -> Metric:
    """Of a key as logged: exact_match/TASK is an exact match. A key of nobody's is its own name."""
    return METRICS.get(key) or METRICS.get(key.partition("/")[0], Metric(key, ""))


def without_ties(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the reward accuracy of a policy that still is its own reference: all rewards are 0, so none is ahead."""
    margin = row.get("rewards/margins")
    tied = isinstance(margin, (int, float)) and abs(margin) < 1e-6
    return {key: value for key, value in row.items() if not (tied and key == "rewards/accuracies")}


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, a real minus sign; n/a for None, NaN and inf."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            text = f"{mantissa}e{int(exponent)}"
    if text == "-0":
        return "0"
    return "−" + text[1:] if text[0] == "-" else text


def percent(value: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return "n/a" if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"
