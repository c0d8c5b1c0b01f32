"""`fastpref chat RUN`: a run's policy answers, beside what it started from or another run, in a terminal or a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastpref.data import Record, Rendering, load_prompts, tokenize_prompts
from fastpref.errors import UserError
from fastpref.report.answers import write_answers
from fastpref.report.reading import text_of

from .checkpoint import seed_everything
from .config import load_config_of_run
from .display import Display
from .model import Policy, load_policy, load_tokenizer
from .prompts import Prompt
from .rendering import dated, rendering_of
from .run_folder import run_of, weights_of_run
from .sample import InMemory, Sampling, sample
from .source import goes_on_with_adapter

ENDLESS = 1 << 30  # tokens of a prompt, where the model says no limit


@dataclass
class Speaker:
    """A model that answers."""

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    adapter_off: bool = False
    said: list[dict[str, Any]] = field(default_factory=list)  # the conversation so far

    def as_itself(self) -> AbstractContextManager[Any]:
        off: AbstractContextManager[Any] = self.policy.model.disable_adapter() if self.adapter_off else nullcontext()
        return off

    def ids(self, prompts: Sequence[Prompt], settings: Sampling) -> list[list[int]]:
        """Of too long a prompt the end."""
        positions = InMemory(self.policy, self.tokenizer).positions
        room = max(1, (positions or ENDLESS) - settings.max_new_tokens)
        records = [Record(f"prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)]
        return tokenize_prompts(records, self.tokenizer, room, "keep_end", self.rendering)[0]

    def answer(self, text: str, settings: Sampling, show: Callable[[str], None]) -> None:
        """To `text` as the conversation's next turn, which it then holds; without a chat template there is none, and
        the text is gone on with. show: is called with what there is so far."""
        chats = bool(self.tokenizer.chat_template)
        self.said = [*self.said, {"role": "user", "content": text}] if chats else []
        (prompt,) = self.ids([self.said if chats else text], settings)
        with self.as_itself():
            engine = InMemory(self.policy, self.tokenizer)
            (ids,) = engine.generate([prompt], [settings.seed], settings, _Streamed(self.tokenizer, show))
        answer = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        show(answer)
        if chats:
            self.said.append({"role": "assistant", "content": answer.strip()})


class _Streamed:
    """What transformers' `generate` calls with each token: first with the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] | None = None

    def put(self, value: Any) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        self.show(str(self.tokenizer.decode(self.ids, skip_special_tokens=True)))

    def end(self) -> None:
        pass


def speakers(path: Path, against: str | None, trust_remote_code: bool = False) -> list[Speaker]:
    """The policy of a run (or checkpoint), and what it is compared with: "base", what the run started from, or another
    run. Raises UserError for a reward model."""
    run_dir = run_of(path)
    config = load_config_of_run(run_dir, trust_remote_code=trust_remote_code)
    if config.reward_model:
        raise UserError(f"{run_dir}: trains a reward model, which does not generate")
    weights, index = weights_of_run(path, len(config.stage_configs()))
    tokenizer = load_tokenizer(config)
    config = dated(config, tokenizer)
    rendering = rendering_of(config.stage_configs()[index])
    policy = load_policy(config, tokenizer, weights)
    found = [Speaker(str(path), policy, tokenizer, rendering)]
    if against == "base":
        name = f"base, {config.model_name_or_path}"
        if config.use_peft and not goes_on_with_adapter(config):
            found.append(Speaker(name, policy, tokenizer, rendering, adapter_off=True))
        else:
            seed_everything(config.seed)  # as the run began: its random weights are made again
            found.append(Speaker(name, load_policy(config, tokenizer), tokenizer, rendering))
    elif against is not None:
        found += speakers(Path(against), None, trust_remote_code)
    return found


def chat(them: Sequence[Speaker], settings: Sampling, display: Display | None = None) -> None:
    """Until an empty line, Ctrl-D or Ctrl-C."""
    console = (display or Display()).console
    how = f"temperature {settings.temperature:g}" if settings.temperature else "the likeliest token each time"
    console.print(Text(f"{how}, at most {settings.max_new_tokens} tokens; an empty line ends, /new starts over", "dim"))
    if not them[0].tokenizer.chat_template:
        console.print(Text("no chat template: what you write is gone on with", "dim"))
    while True:
        try:
            text = console.input("[bold]> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/new":
            for speaker in them:
                speaker.said = []
            continue
        if not text:
            return
        _side_by_side(console, them, text, settings)


def _side_by_side(console: Console, them: Sequence[Speaker], text: str, settings: Sampling) -> None:
    said = {id(speaker): "" for speaker in them}

    def table() -> Table:
        found = Table(expand=True, padding=(0, 1))
        for speaker in them:
            found.add_column(Text(speaker.name), ratio=1, overflow="fold")
        found.add_row(*(Text(said[id(speaker)]) for speaker in them))
        return found

    with Live(table(), console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        for speaker in them:
            def show(answer: str, speaker: Speaker = speaker) -> None:
                said[id(speaker)] = answer
                live.update(table())

            speaker.answer(text, settings, show)


def prompts_of(path: Path) -> list[Prompt]:
    """Of a .txt file its lines; else of records, as rounds.prompts."""
    if path.suffix.lower() != ".txt":
        return [record.prompt for record in load_prompts(str(path))]
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not found:
        raise UserError(f"{path}: no prompts")
    return list(found)


def answer_all(them: Sequence[Speaker], prompts: Sequence[Prompt], settings: Sampling, page: Path,
               display: Display | None = None) -> list[list[str]]:
    """Answers of each speaker to all prompts, and a page of them side by side. Plain prompts are a user's turn where
    there is a chat template."""
    display = display or Display()
    answers = []
    for speaker in them:
        chats = bool(speaker.tokenizer.chat_template)
        asked = [[{"role": "user", "content": p}] if chats and isinstance(p, str) else p for p in prompts]
        with display.counting(speaker.name) as show, speaker.as_itself():
            found = dict(sample(speaker.policy, speaker.tokenizer, speaker.ids(asked, settings), settings, show))
        answers.append([found[i][0].text for i in range(len(prompts))])
    write_answers(page, [speaker.name for speaker in them], [text_of(prompt) for prompt in prompts], answers)
    display.say(f"{len(prompts):,} prompts: {page}")
    return answers
