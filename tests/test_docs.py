"""The documentation says what the code does: its code runs and prints what it shows, its commands and links exist."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from torch.distributed.run import get_args_parser as torchrun_parser

import fastpref
from bench.__main__ import COMMANDS
from fastpref import losses
from fastpref.cli import _parser, parse
from fastpref.errors import UserError
from fastpref.rounds.config import RoundsConfig
from fastpref.rounds.config import config_from as rounds_config_from
from fastpref.rounds.config import load_config as load_rounds_config
from fastpref.train.config import TrainConfig, config_from_dict, load_config
from fastpref.train.ranks import _check
from fastpref.train.server_engine import reload

ROOT = Path(__file__).resolve().parents[1]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md", *SITE]


class Fence(NamedTuple):
    language: str
    text: str
    line: int


def fences(page: Path) -> Iterator[Fence]:
    """The fenced blocks of a page, with the line their text starts on."""
    language, start, body = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opening = re.match(r"\s*```(.*)$", line)
        if opening and language is None:
            language, start, body = opening[1].strip(), number + 1, []
        elif opening:
            yield Fence(language, "\n".join(body) + "\n", start)
            language = None
        else:
            body.append(line)
    assert language is None, f"{page.name}:{start - 1}: a block without an end"


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- code ------------------------------------------------------------------------------------------------------------


WITH_CODE = [page for page in PAGES if any(fence.language == "python" for fence in fences(page))]


def run_page(page: Path) -> None:
    """Executes a page's blocks in one namespace, one after the other, and compares their output with a `text` block
    that follows directly.
    """
    blocks, namespace = list(fences(page)), {"__name__": "__main__"}
    for i, block in enumerate(blocks):
        if block.language != "python":
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)  # noqa: S102
        follows = blocks[i + 1] if i + 1 < len(blocks) else None
        between = block.line + block.text.count("\n") + 1
        if follows and follows.language == "text" and follows.line - 1 - between <= 1:
            assert printed.getvalue() == follows.text, f"{named(page)}:{block.line}"


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_code_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    for package in ("trl", "liger_kernel", "peft", "datasets"):
        imported = rf"(import|from) (fastpref\.integrations\.)?{package}\b"
        if any(re.search(imported, fence.text) for fence in fences(page)):
            pytest.importorskip(package)
    for folder in ("examples", "bench"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # no telemetry
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("FASTPREF_BACKEND", "FASTPREF_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    run_page(page)


def test_a_wrong_page_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n2\n```\n")
    run_page(page)
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)
    page.write_text("```python\nimport fastpref\nfastpref.no_such_name\n```\n")
    with pytest.raises(AttributeError):
        run_page(page)


# ---- commands --------------------------------------------------------------------------------------------------------

CODE = [path for folder in ("fastpref", "bench", "examples", "docs") for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".yaml", ".sh")]
STUDIES = ROOT / "examples" / "studies" / "README.md"


def words_of(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of every command in lines of shell, without comments and environment variables."""
    for i, line in enumerate(text.replace("\\\n", " ").splitlines()):
        for part in re.split(r"\s(?:&&|\|\|)\s", re.split(r"\s{2,}#|\s{2,}(?=\w+ )", line.strip())[0]):
            words = shlex.split(re.sub(r"\[([^\]]*)\]", r"\1", part), comments=True)
            while words and ("=" in words[0] or words[0] == "srun"):
                words = [] if "=$(" in words.pop(0) else words
            if words:
                yield i, words


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every command of a page: in shell blocks; in its prose those that are whole."""
    for fence in fences(page):
        if fence.language in ("bash", "sh") or (fence.language == "" and fence.text.startswith("python -m")):
            yield from ((f"{named(page)}:{fence.line + i}", words) for i, words in words_of(fence.text))
    for span in sorted(spans(page)):
        if re.match(r"(fastpref|torchrun|python|make) ", span):
            for _, words in words_of(span):  # one with nothing but options names them, and is no whole line
                part = words[0] == "fastpref" and all(word.startswith("-") for word in words[2:])
                yield f"{named(page)}: `{span}`", [*words, *["--help"] * part]


def commands_in(source: Path) -> Iterator[tuple[str, list[str]]]:
    """Of a program or configuration: lines of comments and docstrings, --help's last part among them."""
    shown = r"[# ]*((?:[A-Z_]+=\S+ )*(?:fastpref|torchrun|python) (?:-|\S+\.py|[a-z-]+\b(?![.,:;])).*)"
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if found := re.fullmatch(shown, line):
            yield from ((f"{named(source)}:{number}", words) for _, words in words_of(found[1]))


def targets_of_makefile() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def check_command(words: list[str]) -> None:
    """Raises where the command, an option of it, or a file it names does not exist."""
    program = Path(words[0]).name
    if program == "make":
        for target in words[1:]:
            assert "=" in target or target in targets_of_makefile(), f"make has no target {target}"
    elif program == "fastpref":
        check_fastpref(words[1:])
    elif program == "torchrun":
        try:
            its = torchrun_parser().parse_args(words[1:])
        except SystemExit:
            raise AssertionError(f"torchrun does not take {' '.join(words[1:])}") from None
        check_command(["python", *["-m"] * its.module, its.training_script, *its.training_script_args])
    elif program.startswith("python"):
        check_python(words[1:])
    else:
        known = ("pip", "apt-get", "git", "cd", "docker", "pre-commit", "export", "transformers")
        assert program in known, f"unknown command {program}"


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        return check_flags(ROOT / words[0], words[1:])
    module, rest = words[1], words[2:]
    if module == "bench":
        check_bench(rest)
    elif module == "fastpref":
        check_fastpref(rest)
    elif module.split(".")[0] in ("bench", "fastpref"):
        found = importlib.util.find_spec(module)
        assert found and found.origin, f"no module {module}"
        check_flags(Path(found.origin), rest)


def check_flags(script: Path, words: list[str]) -> None:
    """Options that are in the script, or in what the scripts beside it share."""
    assert script.is_file(), f"no such script: {named(script)}"
    shared = (script.with_name(name) for name in ("study.py", "page_tables.py"))
    source = "".join(path.read_text() for path in {script, *shared} if path.is_file())
    for flag in re.findall(r"(?<!\S)--[\w-]+", " ".join(words)):
        assert flag == "--help" or f'"{flag}"' in source, f"{named(script)} has no option {flag}"


def check_bench(words: list[str]) -> None:
    """A benchmark by its name; its options are in its own file or among those that all share."""
    if words and not words[0].startswith("-"):
        assert words[0] in COMMANDS, f"bench has no command {words[0]}"
        names = {words[0], "command", *{"ranks"} & {*words}}
        source = "".join((ROOT / "bench" / f"{name}.py").read_text() for name in names)
        for flag in re.findall(r"--[\w-]+", " ".join(words)):
            assert flag == "--help" or f'"{flag}"' in source, f"bench {words[0]} has no option {flag}"


def check_fastpref(words: list[str]) -> None:
    if words[:1] == ["bench"]:
        return check_bench(words[1:])
    if "--help" in words:
        commands_of = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
        known = commands_of.choices[words[0]]._option_string_actions if words[0] in commands_of.choices else {}
        assert known.keys() >= set(words[1:]) or words == ["--help"], f"fastpref {' '.join(words)}: no such option"
        return
    try:
        options = parse(words)
    except SystemExit as error:
        raise AssertionError(f"fastpref {' '.join(words)}: exit code {error.code}") from None
    config = getattr(options, "config", None)
    if config and (ROOT / config).is_file():
        load = load_rounds_config if words[0] == "rounds" else load_config
        load(ROOT / config, options.overrides)


@pytest.mark.parametrize("page", [*PAGES, STUDIES, None], ids=lambda page: named(page) if page else "programs")
def test_commands_exist(page):
    """Every command line is one that its program takes; none is run."""
    shown = commands(page) if page else chain.from_iterable(map(commands_in, CODE))
    for where, words in shown:
        try:
            check_command(words)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{where}: {error}") from None


def test_a_wrong_command_is_noticed():
    for wrong in (
        "make nothing",
        "fastpref trian x.yaml",
        "fastpref plan --wide 3",
        "fastpref bench nothing",
        "fastpref bench head --no-such",
        "fastpref train examples/quickstart.yaml lerning_rate=1",
        "python -m bench nothing",
        "python -m bench.nothing",
        "python -m fastpref.plan --no-such",
        "python examples/nothing.py",
        "curl x",
        "fastpref train --no-such --help",
        "fastpref train examples/quickstart.yaml --resume output_dir",
        "torchrun --no-such=1 -m fastpref train dpo.yaml",
        "torchrun -m fastpref train dpo.yaml --resum-e",
        "python examples/plain_pytorch.py --no-such 1",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_command(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_configurations_are_valid(page):
    """Whole ones are checked as `fastpref train` checks them; parts are completed first."""
    for fence in fences(page):
        if fence.language == "yaml" and not fence.text.startswith("apiVersion:"):  # Kubernetes' is below
            values = yaml.safe_load(fence.text)
            missing = {"model_name_or_path": "m", "train_dataset": "d", "output_dir": "o"}
            if all("train_dataset" in stage for stage in values.get("stages") or [{}]):
                missing.pop("train_dataset")
            check = rounds_config_from if "rounds" in values else config_from_dict
            check({**missing, **values}, f"{named(page)}:{fence.line}")


def job_and_script() -> tuple[list[str], dict[str, str], str]:
    """Of docs/multi-gpu.md: the Kubernetes Job's command and environment, and the script for SLURM."""
    blocks = [fence.text for fence in fences(ROOT / "docs" / "multi-gpu.md")]
    service, job = yaml.safe_load_all(next(text for text in blocks if text.startswith("apiVersion:")))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    its = torchrun_parser().parse_args(container["args"])
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert service["spec"] == {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}}
    assert pod["subdomain"] == subdomain and its.rdzv_endpoint == f"{name}-0.{subdomain}:29500"
    assert its.nnodes == str(spec["completions"]) == str(spec["parallelism"])
    assert its.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    return container["command"] + container["args"], environment, next(t for t in blocks if t.startswith("#!/bin/bash"))


def test_the_kubernetes_job_and_the_slurm_script_start_the_same_run(tmp_path, monkeypatch):
    """srun and scontrol are stand-ins: one prints what it would run."""
    for name, does in (("scontrol", "printf 'n1\\nn2\\n'"), ("srun", 'env; printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    words, environment, script = job_and_script()
    nodes = re.search(r"--nodes=(\d+)", script)[1]
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": nodes,
             "SLURM_JOB_ID": "7"}
    out = subprocess.run(["bash", "-eu"], input=script, env=given, capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()
    assert {f"{key}={value}" for key, value in environment.items()} <= set(lines)
    run = lines[lines.index("torchrun") :]
    assert [word for word in words if "--rdzv-" not in word] == [word for word in run if "--rdzv-" not in word]
    assert {"--rdzv-backend=c10d", "--rdzv-endpoint=n1:29500", "--rdzv-id=7"} <= set(run)
    for command in (words, run):
        check_command(command)
    its = torchrun_parser().parse_args(run[1:])
    ranks, overrides = int(its.nnodes) * int(its.nproc_per_node), [w for w in its.training_script_args if "=" in w]
    stage = config_from_dict({"model_name_or_path": "m", "train_dataset": "d", "output_dir": "o"}
                             | {key: int(value) for key, value in (word.split("=") for word in overrides)})
    _check(stage.stage_configs()[0], ranks)
    with pytest.raises(UserError, match="33 ranks"):
        _check(stage.stage_configs()[0], ranks + 1)


def test_the_reload_commands_of_servers_are_whole(tmp_path, monkeypatch):
    """curl is a stand-in that keeps what it is given."""
    (tmp_path / "curl").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/given\n')
    (tmp_path / "curl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = {}
    for span in spans(ROOT / "docs" / "multi-gpu.md"):
        if span.startswith("sampler_reload: "):
            reload(yaml.safe_load(span)["sampler_reload"], tmp_path)
            _, url, _, header, _, body = (tmp_path / "given").read_text().splitlines()
            assert header == "Content-Type: application/json"
            found[url.partition("/")[2].rpartition("/")[2]] = json.loads(body)
    folder = str(tmp_path.resolve())
    assert found == {"update_weights_from_disk": {"model_path": folder},
                     "collective_rpc": {"method": "reload_weights", "kwargs": {"weights_path": folder}}}


@pytest.mark.slow
def test_the_kubernetes_jobs_command_runs_on_two_nodes(tmp_path):
    """Both on this machine, of one process each; the service's name is here the loopback's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, environment, _ = job_and_script()
    for before, after in (("--nnodes=4", "--nnodes=2"), ("--nproc-per-node=8", "--nproc-per-node=1"),
                          ("dpo-0.dpo:29500", f"127.0.0.1:{port}"), ("dp_replicate=4", "dp_replicate=2")):
        assert sum(before in word for word in words) == 1
        words = [word.replace(before, after) for word in words]
    (tmp_path / "dpo.yaml").write_text(f"""
model_name_or_path: {ROOT}/examples/model
init_from_config: true
train_dataset: {ROOT}/examples/data/train.jsonl
output_dir: run
loss: dpo
max_steps: 2
per_device_train_batch_size: 1
""")
    its = os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    nodes = [subprocess.Popen(command, cwd=tmp_path, env=its, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# ---- names, files, links ---------------------------------------------------------------------------------------------


def spans(page: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(page)))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_named_exist(page):
    """In backticks, and at the start of a line of an indented list of files."""
    listed = re.findall(r"^    (\S+/\S*)(?:,|\s)", prose(page), flags=re.M)
    for name in spans(page).union(listed):
        if re.fullmatch(r"(fastpref|bench|tests|examples|csrc|docs)/[\w./-]*", name):
            assert (ROOT / name).exists(), f"{named(page)}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_of_the_package_exist(page):
    """`fp.DPO`, `fastpref.losses.metrics`, `fp.plan(...)`; `seq.margins` of a `SequenceLogps`."""
    fields_of_seq = {field.name for field in dataclasses.fields(losses.SequenceLogps)}
    for span in spans(page):
        match = re.match(r"(?:fp|fastpref)((?:\.\w+)+)", span)
        here, path = fastpref, "fastpref"
        for name in match[1][1:].split(".") if match else ():
            path += f".{name}"
            if not hasattr(here, name):
                assert importlib.util.find_spec(path), f"{named(page)}: `{span}`"
                try:
                    here = importlib.import_module(path)
                except ImportError:  # an optional package is missing
                    break
            else:
                here = getattr(here, name)
        match = re.match(r"seq\.(\w+)", span)
        assert not match or hasattr(losses.SequenceLogps, match[1]) or match[1] in fields_of_seq, f"`{span}`"


def anchors(page: Path) -> set[str]:
    """Ids of the headings, as both Python-Markdown and GitHub make them (for headings of plain words)."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    slugs = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[\s]+", "-", slug) for slug in slugs}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{named(page)}: {link}"
        if page in SITE:
            assert target in SITE or target.parent == ROOT / "docs", f"{named(page)}: {link} is not part of the site"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{named(page)}: {link}; there are {sorted(anchors(target))}"


def test_every_page_is_in_the_navigation():
    def pages(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry if isinstance(entry, list) else entry.values():
                yield from pages(part)

    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(ROOT / "docs")) for page in SITE)


def test_the_index_links_every_page():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert set(SITE) - {index} <= linked


def test_what_the_readme_names_of_the_docs_is_a_link():
    assert not [span for span in spans(ROOT / "README.md") if re.fullmatch(r"(docs|examples)/[\w/.-]*", span)]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cells = json.loads((ROOT / "examples" / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6 and not any(cell.get("outputs") for cell in cells)  # committed without
    namespace, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for i, text in enumerate(code):
            exec(compile(text, f"cell {i}", "exec"), namespace)  # noqa: S102
    assert "loss and gradients agree" in printed.getvalue()
    assert namespace["history"][-1]["logps/chosen"] > namespace["history"][0]["logps/chosen"]


def test_the_tables_of_keys_and_losses_are_the_codes():
    spec = importlib.util.spec_from_file_location("config_tables", ROOT / "docs" / "config_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.written(page), "run: python docs/config_tables.py"
    rounds = tables.ROUNDS.read_text(encoding="utf-8")
    assert rounds == tables.written_rounds(rounds), "run: python docs/config_tables.py"
    watch = tables.WATCH.read_text(encoding="utf-8")
    assert watch == tables.written_watch(watch), "run: python docs/config_tables.py"
    keys = {field.name for field in dataclasses.fields(RoundsConfig)}
    assert keys <= set(re.findall(r"^\| `(\w+)`", rounds, flags=re.M))
    described = set(re.findall(r"^\| \[?`(\w+)`", page, flags=re.M))
    loss_classes = tables.config.loss_classes()
    fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"loss_options"}
    assert fields <= described and set(loss_classes) <= described
    options = {field.name for cls in loss_classes.values() for field in dataclasses.fields(cls)}
    assert options <= set(re.findall(r"`(\w+)=", page))


def test_every_loss_has_its_normalisation():
    page = (ROOT / "docs" / "normalisation.md").read_text(encoding="utf-8")
    missing = [name for name in losses.CLASSES if f"`{name}`" not in page]
    assert not missing
