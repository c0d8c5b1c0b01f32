"""Makes the quickstart's data: small tasks with checkable answers, as preference pairs in TRL's format.

    python examples/make_data.py --seed 0 --out examples/data

    train.jsonl     {prompt, chosen, rejected, task, answer}   preference pairs
    heldout.jsonl   the same, for evaluation
    sft.jsonl       {prompt, completion}                       for the supervised warm start

No prompt occurs twice, in one file or in two. `chosen` is right and ends with `answer`; `rejected` is a mistake people
make: a forgotten carry, two neighbours swapped, the wrong field, day and month exchanged, or a hedge in place of an
answer. The demonstrations of sft.jsonl are like ones from a crowd: a share of them (NOISE) contains such a mistake. A
model that imitates them makes these mistakes too, and that is what the preferences are there to undo.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SIZES = {"train": 3500, "heldout": 350, "sft": 9100}
NOISE = 0.33  # share of demonstrations with a mistake
HEDGES = 0.12  # share of mistakes that are a hedge: the right answer, then a wrong one

NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mia Nils Olga Paul Rosa Sam Tina Uwe".split()
CITIES = "Oslo Rome Lima Cairo Paris Quito Delhi Tokyo Bern Accra Kyiv Seoul Turin Porto Malmo Davos".split()
COLOURS = "red blue green black white pink grey brown".split()
PETS = "cat dog fish horse parrot rabbit snake goat".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = "abcdefghkmnprstuvwxyz"


class Item(NamedTuple):
    """A question, a right response that ends with the answer, and the same response with a mistake made on the way."""

    question: str
    right: str
    wrong: str
    answer: str
    wrong_answer: str


def addition(rng: random.Random) -> Item:
    """A number plus a digit, by columns. The mistake: the carry is forgotten, or one is carried that is not there."""
    hundreds, tens, ones, digit = rng.randint(1, 9), rng.randint(0, 8), rng.randint(0, 9), rng.randint(2, 9)
    number = f"{hundreds}{tens}{ones}"
    question = rng.choice(["Add {} and {}.", "What is {} + {}?", "Sum of {} and {}?"]).format(number, digit)
    column = ones + digit

    def steps(carry: int) -> tuple[str, str]:
        total = f"{hundreds}{tens + carry}{column % 10}"
        return f"{ones}+{digit}={column}, {tens}+{carry}={tens + carry}, so {total}", total

    right, answer = steps(column // 10)
    wrong, wrong_answer = steps(1 - column // 10)
    return Item(question, right, wrong, answer, wrong_answer)


def sorting(rng: random.Random) -> Item:
    """Four numbers. The mistake: two neighbours are swapped, or the order is the opposite one."""
    numbers = rng.sample(range(10), 4)
    down = rng.random() < 0.5
    way = "downwards" if down else "upwards"
    question = rng.choice(["Sort {}: {}", "Put in order {}: {}"]).format(way, " ".join(map(str, numbers)))
    ordered = sorted(numbers, reverse=down)
    wrong = ordered[::-1]
    if rng.random() < 0.5:
        wrong, i = list(ordered), rng.randrange(3)
        wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
    right_text, wrong_text = " ".join(map(str, ordered)), " ".join(map(str, wrong))
    return Item(question, right_text, wrong_text, right_text, wrong_text)


def largest(rng: random.Random) -> Item:
    """One of five numbers. The mistake: the opposite one, or the one named last."""
    numbers = rng.sample(range(10), 5)
    low = rng.random() < 0.5
    best, opposite = (min, max) if low else (max, min)
    answer = best(numbers)
    others = [n for n in (opposite(numbers), numbers[-1]) if n != answer]
    wrong = rng.choice(others)
    question = f"Which is the {'smallest' if low else 'largest'}: {' '.join(map(str, numbers))}?"
    return Item(question, f"It is {answer}", f"It is {wrong}", str(answer), str(wrong))


def extraction(rng: random.Random) -> Item:
    """One field of a record. The mistake: another field's value."""
    record = {
        "name": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "age": str(rng.randint(10, 99)),
        "colour": rng.choice(COLOURS),
        "pet": rng.choice(PETS),
    }
    fields = sorted(rng.sample(list(record), 3), key=list(record).index)
    asked = rng.choice(fields)
    other = rng.choice([name for name in fields if name != asked])
    listed = ", ".join(f"{name} {record[name]}" for name in fields)
    question = rng.choice(["{}. What is the {}?", "Read: {}. Give the {}."]).format(listed, asked)
    right, wrong = record[asked], record[other]
    return Item(question, f"The {asked} is {right}", f"The {asked} is {wrong}", right, wrong)


def date(rng: random.Random) -> Item:
    """A date in ISO order. The mistake: day and month exchanged, or a missing zero."""
    year, month, day = rng.randint(1950, 2049), rng.randint(1, 12), rng.randint(1, 28)
    question = rng.choice(["Write {} {} {} as year-month-day.", "ISO date of {} {} {}?"]).format(
        day, MONTHS[month - 1], year
    )
    right = f"{year}-{month:02}-{day:02}"
    wrong = f"{year}-{day:02}-{month:02}"
    if day == month or (min(day, month) < 10 and rng.random() < 0.3):
        wrong = f"{year}-{month}-{day}" if min(day, month) < 10 else f"{day:02}-{month:02}-{year}"
    return Item(question, right, wrong, right, wrong)


def reversal(rng: random.Random) -> Item:
    """A list of letters backwards. The mistake: two neighbours are left as they were, or the whole list is."""
    letters = rng.sample(LETTERS, rng.randint(3, 5))
    backwards = letters[::-1]
    wrong = letters
    if rng.random() < 0.5:
        wrong, i = list(backwards), rng.randrange(len(backwards) - 1)
        wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
    question = rng.choice(["Reverse: {}", "Write backwards: {}"]).format(" ".join(letters))
    right_text, wrong_text = " ".join(backwards), " ".join(wrong)
    return Item(question, right_text, wrong_text, right_text, wrong_text)


def position(rng: random.Random) -> Item:
    """The n-th letter of a list. The mistake: its neighbour."""
    letters = rng.sample(LETTERS, rng.randint(4, 6))
    n = rng.randrange(len(letters))
    near = rng.choice([i for i in (n - 1, n + 1) if 0 <= i < len(letters)])
    ordinal = "first second third fourth fifth sixth".split()[n]
    question = rng.choice(["Which is the {} of {}?", "Give the {} of {}"]).format(ordinal, " ".join(letters))
    return Item(question, f"It is {letters[n]}", f"It is {letters[near]}", letters[n], letters[near])


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "addition": addition,
    "sorting": sorting,
    "largest": largest,
    "extraction": extraction,
    "date": date,
    "reversal": reversal,
    "position": position,
}


def make_pair(task: str, rng: random.Random) -> dict[str, str]:
    item = TASKS[task](rng)
    wrong = item.wrong
    if rng.random() < HEDGES:
        wrong = f"{item.right} or {item.wrong_answer}"
    return {
        "prompt": f"Q: {item.question}\nA:",
        "chosen": f" {item.right}",
        "rejected": f" {wrong}",
        "task": task,
        "answer": item.answer,
    }


def make(seed: int) -> dict[str, list[dict[str, str]]]:
    """{"train": pairs, "heldout": pairs, "sft": demonstrations}; a function of the seed alone."""
    rng = random.Random(seed)
    seen: set[str] = set()
    files: dict[str, list[dict[str, str]]] = {}
    for name, size in SIZES.items():
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            task = list(TASKS)[len(rows) % len(TASKS)]
            pair = make_pair(task, rng)
            if pair["prompt"] in seen:
                continue
            seen.add(pair["prompt"])
            if name == "sft":
                completion = pair["rejected"] if rng.random() < NOISE else pair["chosen"]
                pair = {"prompt": pair["prompt"], "completion": completion}
            rows.append(pair)
        rng.shuffle(rows)
        files[name] = rows
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("examples/data"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make(arguments.seed).items():
        path = arguments.out / f"{name}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {len(rows)} records, {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
