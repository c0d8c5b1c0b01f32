"""Makes the prompts of examples/smollm2/data, the same for the same seed: a task about a topic, and one constraint.

    python -m examples.smollm2.make_prompts

    train.jsonl      the kinds of constraint that are trained, on the topics that are trained
    heldout.jsonl    the same kinds on other topics; then, on those topics, kinds that are never trained
    questions.jsonl  100 questions without any constraint, on a third set of topics: what the model must not lose

The constraints are in the manner of IFEval (arXiv 2311.07911). What they mean exactly is in verifier.py.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
SEED = 14
TRAIN, HELD_OUT, HELD_OUT_OF_NEW_KIND, QUESTIONS = 80, 20, 30, 100  # prompts a kind; questions in all

TASKS = (  # short answers: those that end are what most constraints can be met by, and cost the least
    "Say something about {}.", "Write a very short text about {}.", "Tell me one thing about {}.",
    "Give me one piece of advice about {}.", "Describe {} in a few words.", "Write a line to a friend about {}.",
    "What is nice about {}?", "Write a caption for a picture of {}.",
)
TOPICS = (
    "coffee", "riding a bicycle", "growing tomatoes", "the moon", "old maps", "learning the piano", "rainy days",
    "baking bread", "cats", "train journeys", "lighthouses", "the desert", "saving money", "chess", "snow",
    "beekeeping", "running", "public libraries", "camping in the woods", "volcanoes", "green tea",
    "learning a language", "bridges", "swimming", "photography", "dinosaurs", "markets", "knitting", "the ocean",
    "robots", "making soup", "owls", "city parks", "writing letters", "hot air balloons", "mushrooms", "the violin",
    "street food", "glaciers", "keeping a diary", "horses", "spices", "wind power", "museums", "fishing", "origami",
    "elephants", "winter clothes", "cheese", "the stars", "apple trees", "board games", "sleep", "sailing", "pottery",
    "wolves", "cooking rice", "castles", "rivers", "folk music", "whales", "houseplants", "skating", "clocks", "honey",
    "mountains",
)
HELD_OUT_TOPICS = (
    "painting a room", "penguins", "jazz", "growing herbs", "comets", "ferries", "chocolate", "mending clothes",
    "the jungle", "jigsaw puzzles", "night trains", "waterfalls", "goats", "paper kites", "hiking", "earthquakes",
    "pancakes", "the alphabet", "old coins", "thunderstorms",
)
ASKED = (
    "What is {}?", "Can you explain how {} works?", "What is the history of {}?", "What are the benefits of {}?",
    "How would you explain {} to a child?",
)
QUESTION_TOPICS = (
    "a telescope", "the water cycle", "a compass", "democracy", "photosynthesis", "the printing press", "gravity",
    "recycling", "a vaccine", "the internet", "a battery", "an orchestra", "electricity", "the heart", "a rainbow",
    "paper", "a microscope", "irrigation", "glass", "a rocket",
)

# kind -> (ways to ask, arguments to choose from). The first are trained, those of NEW_KINDS are not.
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
KINDS: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "lowercase": (("Use only lowercase letters.", "Your whole answer must be in lowercase, without capital letters."),
                  ("",)),
    "uppercase": (("Use only capital letters.", "Your whole answer must be in CAPITAL LETTERS."), ("",)),
    "sentences": (("Answer in exactly {}.", "Your answer must have exactly {}."),
                  ("one sentence", "two sentences", "three sentences")),
    "bullets": (('Answer with exactly {} bullet points, each on a line that starts with "* ".',
                 'Your answer must be a list of exactly {} bullet points. Use "* " for each.'),
                ("two", "three", "four", "five")),
    "include": (('Include the word "{}" in your answer.', 'Your answer must contain the word "{}".'),
                ("purple", "window", "whisper", "seven", "garden", "silver", "yesterday", "bridge", "curious",
                 "lemon")),
    "exclude": (('Do not use the word "{}".', 'The word "{}" must not appear in your answer.'),
                ("and", "the", "is", "can", "to", "it", "with", "a")),
    "begin": (('Begin your answer with "{}"', 'The first words of your answer must be "{}"'),
              ("In my opinion", "Here is what I know", "Once upon a time", "To be honest", "Good question",
               "My dear friend")),
    "end": (('End your answer with the words "{}" and nothing after them.',
             'The last words of your answer must be "{}"'),
            ("That is all.", "Have a nice day!", "I hope this helps.", "Let me know what you think.", "The end.")),
    "at_most_words": (("Use at most {} words.", "Keep your answer to {} words or fewer."), (10, 15, 20, 30)),
    "at_least_words": (("Use at least {} words.", "Your answer must have {} words or more."), (20, 30, 40)),
    "quoted": (("Put your whole answer in double quotation marks.",
                'Wrap your entire answer in double quotes ("...").'), ("",)),
    "no_commas": (("Do not use any commas.", "Your answer must not contain a comma."), ("",)),
    "title": (("Give your answer a title in double angle brackets, such as <<my title>>.",
               "Begin with a title wrapped in double angle brackets, like <<this>>."), ("",)),
    "json": (("Answer with one JSON object and nothing else.",
              'Give your whole answer as a JSON object, such as {{"text": "..."}}.'), ("",)),
    "numbered": (("Answer with a numbered list of exactly {} items.", 'Write exactly {} items, numbered "1.", "2." '
                  "and so on."), ("two", "three", "four")),
    "paragraphs": (("Write exactly {} paragraphs, with an empty line between them.",
                    "Your answer must have exactly {} paragraphs, separated by empty lines."), ("two", "three")),
    "postscript": (('At the end of your answer add a postscript that starts with "P.S."',
                    'Close with a line that begins with "P.S."'), ("",)),
    "repeated": (('Use the word "{}" at least twice.', 'The word "{}" must appear two times or more.'),
                 ("truly", "simple", "always", "quiet", "wonder")),
}
# Asked for in the case that is asked for: of 232 answers to questions in usual writing 2 were, too few to learn from.
CASES = {"lowercase": str.lower, "uppercase": str.upper}
NEW_KINDS = ("numbered", "paragraphs", "postscript", "repeated")


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def value(argument: Any) -> Any:
    """What the verifier compares with: the number of "two" and "two sentences"."""
    return NUMBERS.get(str(argument).split(" ")[0], argument)


def prompts(rng: random.Random, kind: str, topics: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """Different ones, the arguments evenly among them."""
    ways, arguments = KINDS[kind]
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        argument = arguments[len(found) % len(arguments)]
        topic = rng.choice(topics)
        text = f"{rng.choice(TASKS).format(topic)} {rng.choice(ways).format(argument)}"
        text = CASES.get(kind, str)(text)
        found.setdefault(text, {"prompt": chat(text), "kind": kind, "argument": value(argument), "topic": topic})
    return list(found.values())


def make(seed: int = SEED) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(seed)
    trained = [kind for kind in KINDS if kind not in NEW_KINDS]
    train = [record for kind in trained for record in prompts(rng, kind, TOPICS, TRAIN)]
    held_out = [record for kind in trained for record in prompts(rng, kind, HELD_OUT_TOPICS, HELD_OUT)]
    held_out += [record for kind in NEW_KINDS for record in prompts(rng, kind, HELD_OUT_TOPICS, HELD_OUT_OF_NEW_KIND)]
    rng.shuffle(train)
    asked = [way.format(topic) for topic in QUESTION_TOPICS for way in ASKED]
    return {"train": train, "heldout": held_out, "questions": [{"prompt": chat(text)} for text in asked[:QUESTIONS]]}


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, records in make().items():
        (DATA / f"{name}.jsonl").write_text(lines(records), encoding="utf-8")
        print(f"{name}: {len(records)} prompts")


if __name__ == "__main__":
    main()
