"""The command line: arguments in, one clear line or a table out. Does nothing that the API does not."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from layercut import api, display, gallery
from layercut.analysis import PAGE
from layercut.architecture import find_stack
from layercut.caches import NO_CACHE, OFFLINE
from layercut.errors import LayercutError, OutputError, printable
from layercut.hubfaults import UnreachableError, scrubbed
from layercut.metrics import parse_metric
from layercut.ranks import SilentError, joined
from layercut.recipe import Recipe
from layercut.report import REPORT, read_report
from layercut.sizes import parse_size
from layercut.source import resolve
from layercut.upload import Upload
from layercut.version import __version__

DONE, INPUT, USAGE, BUG, INTERRUPTED = 0, 1, 2, 3, 130
# Characters of a line of an error.
LONGEST = 2000

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe, for example steps.0.prune.layers=8."
)
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bars on stderr.")


def _set(variable: str) -> Any:
    """A callback of a flag that sets a variable of the environment for this command."""

    def call(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            before = os.environ.get(variable)
            os.environ[variable] = "1"
            context.call_on_close(lambda: os.environ.pop(variable) if before is None else os.environ.update({variable: before}))

    return call


offline = click.option(
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_set(OFFLINE[0]),
    help="Ask no network: models of the Hub come from the local cache.",
)


no_cache = click.option(
    "--no-cache", is_flag=True, expose_value=False, callback=_set(NO_CACHE), help="Measure anew, also what was measured before."
)


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _samples(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    return value if value in (None, "auto") else click.IntRange(min=1).convert(value, parameter, context)


memory = click.option(
    "--memory",
    metavar="SIZE",
    callback=_size,
    help="Memory that measuring may take, for example 8GB, instead of what is free. A larger model is streamed layer by layer.",
)


def measures(command: Any) -> Any:
    """The options of every command that may have to measure."""
    for option in (quiet, offline, as_json, no_cache, memory, overrides):  # click lists the last one first
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="layercut")
def cli() -> None:
    """Cut, repeat and stack the layers of transformer checkpoints from a YAML recipe."""


@cli.command()
@click.argument("recipe", metavar="RECIPE|PLAN")
@click.option("--out", metavar="DIR", help="Output folder, instead of the recipe's.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that holds something.")
@click.option("--restart", is_flag=True, help="Throw away what a stopped run wrote, instead of going on from it.")
@click.option(
    "--no-fsync", "durable", flag_value=False, default=True, help="Leave the disk to the system: a power cut may spoil the output."
)
@measures
def run(recipe: str, out: str | None, overrides: Sequence[str], as_json: bool, quiet: bool, **choices: Any) -> None:
    """Plan, write, check, evaluate and upload, as the recipe says."""
    loaded = api.load(recipe, overrides)
    folder = api.output_of(loaded, out)
    with _terminated_as_interrupted(), joined() as ranks:
        report = api.run_recipe(loaded, out=folder, progress=not quiet and ranks.main, ranks=ranks, **choices)
    if not ranks.main:
        return
    for note in report.notes:
        click.echo(f"note: {printable(note)}", err=True)
    _echo(_plain(report.to_json()) if as_json else display.report_text(report, folder), nl=not as_json)


@cli.command()
@click.argument("recipe")
@click.option("-o", "--output", metavar="FILE", help="Write the plan as JSON; `layercut run FILE` does exactly what it says.")
@measures
def plan(recipe: str, output: str | None, overrides: Sequence[str], memory: int | None, as_json: bool, quiet: bool) -> None:
    """Decide everything, write no model."""
    if output is not None:
        _check_file(Path(output))  # before the long work
    with joined() as ranks:
        made = api.plan_recipe(recipe, overrides=overrides, memory=memory, ranks=ranks, progress=not quiet and ranks.main)
    if not ranks.main:
        return
    if output is not None:
        try:
            Path(output).write_text(made.to_json(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the plan: {error.strerror}", where=output) from None
    _echo(_plain(made.to_json()) if as_json else display.plan_text(made), nl=not as_json)
    for line in api.outstanding(made):
        click.echo(f"to fetch before it is done: {line}", err=True)
    if output is not None:
        click.echo(f"to do this: layercut run {output}", err=True)


def _check_file(path: Path) -> None:
    """Raise OutputError for a file that could not be written."""
    wrong = "it is a folder" if path.is_dir() else None if path.parent.is_dir() else "there is no such folder"
    if wrong is None and not os.access(path if path.exists() else path.parent, os.W_OK):
        wrong = "no permission"
    if wrong is not None:
        raise OutputError(f"cannot write the plan: {wrong}", where=path)


@cli.command()
@click.argument("target", metavar="MODEL|RECIPE")
@click.option("-o", "--output", metavar="DIR", help="Write tables (JSON, CSV, Markdown), pictures (PNG) and a page (HTML) to this folder.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that holds something.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME[:TOKEN]", help="Measure this, for example angular:all; may be repeated.")
@click.option(
    "--text", metavar="PATH", help="Text to measure on (.txt, .jsonl, .csv, .parquet), instead of the recipe's or the built-in one."
)
@click.option("--column", help="Column of the text in .jsonl, .csv and .parquet.")
@click.option(
    "--samples", callback=_samples, metavar="N|auto", help="Sequences at most (recipe's number or 128); auto: until the ranking is settled."
)
@click.option("--max-length", type=click.IntRange(min=2), help="Tokens of a sequence at most, instead of the recipe's number or 512.")
@measures
def analyze(
    target: str,
    output: str | None,
    overwrite: bool,
    metrics: Sequence[str],
    overrides: Sequence[str],
    memory: int | None,
    as_json: bool,
    quiet: bool,
    **text: Any,
) -> None:
    """Measure which blocks could go: how far apart states are. Of a model, or of all models of a recipe."""
    settings = {{"text": "path"}.get(name, name): value for name, value in text.items() if value is not None}
    wanted = [parse_metric(metric) for metric in metrics]
    with _terminated_as_interrupted(), joined() as ranks:
        options: dict[str, Any] = {"overrides": overrides, "out": output, "overwrite": overwrite, "memory": memory, "ranks": ranks}
        found = api.analyze(target, metrics=wanted, text=settings, progress=not quiet and ranks.main, **options)
    if not ranks.main:
        return
    _echo(_plain(found.to_json()) if as_json else display.analysis_text(found), nl=not as_json)
    if output is not None:
        click.echo(f"to look at it: {Path(output) / PAGE}", err=True)


@cli.command()
@click.argument("model")
@click.option(
    "--stack", metavar="NAME", help="Which stack of layers, where a model has several: encoder, decoder, vision, ..., or its prefix."
)
@offline
@as_json
def inspect(model: str, stack: str | None, as_json: bool) -> None:
    """Show layers, sizes, and what in the config depends on layers. Also how layercut made the model, if it did."""
    checkpoint = resolve(model)
    data = display.inspect_data(checkpoint, find_stack(checkpoint, stack))
    with suppress(UnreachableError):  # it is of use, not needed
        checkpoint.path(REPORT)
    report = read_report(checkpoint.folder) if (checkpoint.folder / REPORT).is_file() else None
    if as_json:
        _echo(_dumps({**data, "report": None if report is None else report.model_dump(mode="json")}))
        return
    _echo(display.inspect_text(data))
    if report is not None:
        _echo(f"\nmade by layercut {report.version} from\n{display.report_text(report, checkpoint.folder)}")


@cli.command("eval")
@click.argument("model")
@click.option("--text", metavar="PATH", help="Held-out text (.txt, .jsonl, .csv, .parquet); the built-in one if not given.")
@click.option("--column", help="Column of the text in .jsonl, .csv and .parquet.")
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Windows of text at most.")
@click.option("--max-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window.")
@memory
@as_json
@offline
@quiet
def evaluate(
    model: str, text: str | None, column: str | None, samples: int, max_length: int, memory: int | None, as_json: bool, quiet: bool
) -> None:
    """Measure perplexity on held-out text."""
    from layercut.calibration import BuiltinCalibration, TextCalibration
    from layercut.perplexity import LanguageModel

    common: dict[str, Any] = {"samples": samples, "max_length": max_length}
    data = BuiltinCalibration(**common) if text is None else TextCalibration(path=text, column=column, **common)
    folder = resolve(model, whole=True, progress=not quiet).folder
    result = LanguageModel(folder, memory=memory).perplexity(data, progress=not quiet)
    where = f"{result.source} text, {result.windows} windows of {result.max_length}, {result.dtype}"
    line = f"perplexity {result.value:.4f} on {result.tokens} tokens ({where})"
    _echo(_dumps(result.model_dump(mode="json")) if as_json else line)


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--no-contents", is_flag=True, help="Do not compare every byte with the sources.")
@click.option("--no-load", is_flag=True, help="Do not load the model with transformers.")
@as_json
@offline
@quiet
def verify(folder: str, no_contents: bool, no_load: bool, as_json: bool, quiet: bool) -> None:
    """Check an output: its report, its sources, and that it loads."""
    from layercut.verify import verify as check

    result = check(Path(folder), load=not no_load, contents=not no_contents, progress=not quiet)
    if as_json:
        _echo(_dumps(result.model_dump(mode="json")))
    else:
        for line in display.columns([("ok" if c.ok else "FAILED", c.name, c.detail) for c in result.checks], indent=""):
            _echo(line)
    if not result.ok:
        failed = [c.name for c in result.checks if not c.ok]
        raise LayercutError(f"{len(failed)} of {len(result.checks)} checks failed: {', '.join(failed)}", where=folder)


@cli.command()
@click.argument("folder", metavar="DIR")
@click.argument("repo")
@click.option("--private/--public", default=None, help="Whether the repository is private; when not given, as your account makes new ones.")
@click.option("--branch", metavar="NAME", help="Branch to publish on, made when it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the repository.")
@click.option("--message", metavar="LINE", help="Message of the commit; made from the plan if not given.")
@click.option("--license", metavar="ID", help="Licence that the card states; needed when sources differ in theirs.")
@click.option("--license-name", metavar="NAME", help="Name of the licence, with --license other.")
@click.option("--license-link", metavar="LINK", help="Address or file of the licence, with --license other.")
@click.option("--replace", is_flag=True, help="Remove what stands in the repository and is not of layercut, in the same commit.")
@as_json
@quiet
def push(folder: str, repo: str, as_json: bool, quiet: bool, **choices: Any) -> None:
    """Publish an output on the Hub, with a card."""
    from layercut.push import outcome_text

    try:
        upload = Upload(repo=repo, **choices)
    except ValidationError as error:
        first = error.errors()[0]
        said = str(first["msg"]).removeprefix("Value error, ")
        raise click.UsageError(f"{'.'.join(map(str, first['loc'])) or 'options'}: {said}") from None
    with _terminated_as_interrupted():
        outcome = api.push_model(folder, upload, progress=not quiet)
    told = {**outcome._asdict(), "published": outcome.published.model_dump(mode="json")}
    _echo(_dumps(told) if as_json else outcome_text(outcome))


@cli.command()
@click.argument("name", required=False)
@as_json
def new(name: str | None, as_json: bool) -> None:
    """Print a starter recipe; without a name, the gallery. Save it as a file of your own."""
    if name is not None:
        found = gallery.starter(name)
        _echo(_dumps(found._asdict()) if as_json else found.text, nl=as_json)
        return
    listed = gallery.starters()
    if as_json:
        _echo(_dumps([{"name": one.name, "group": one.group, "summary": one.summary} for one in listed]))
        return
    for line in display.columns([(one.name, one.summary) for one in listed], indent=""):
        _echo(line)
    click.echo("to begin with one: layercut new NAME > NAME.yaml", err=True)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    _echo(_dumps(Recipe.schema_document()))


def _echo(text: str, nl: bool = True) -> None:
    """Text on stdout, and nothing in it that works on the terminal: names and values come from files of others."""
    try:
        click.echo(printable(text), nl=nl)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where="stdout") from None


def _dumps(data: Any) -> str:
    return _plain(json.dumps(data, indent=2, ensure_ascii=False))


def _plain(document: str) -> str:
    """JSON text with the same meaning in which everything prints."""
    if document.isprintable():
        return document
    return "".join(sign if sign.isprintable() or sign == "\n" else json.dumps(sign)[1:-1] for sign in document)


def _shortened(text: str) -> str:
    """Lines without their middle where they are no lines for a person: a name may have any length."""
    return "\n".join(line if len(line) <= LONGEST else f"{line[: LONGEST - 300]} … {line[-300:]}" for line in text.split("\n"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 the input is at fault, 2 usage, 3 a bug, 130 interrupted."""
    command: Callable[..., Any] = cli.main
    try:
        command(args=None if argv is None else list(argv), prog_name="layercut", standalone_mode=False)
    except SilentError:
        return INPUT
    except LayercutError as error:
        click.echo(f"error: {_shortened(str(error))}", err=True)
        return INPUT
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return USAGE
    except (KeyboardInterrupt, click.Abort) as stop:
        reason = stop.__cause__ if isinstance(stop, click.Abort) and stop.__cause__ is not None else stop
        click.echo("; ".join(["interrupted", *map(str, reason.args)]), err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our stdout has gone: nothing to say, and nobody to say it to
        return INPUT
    except Exception:
        click.echo(_bug_report(), err=True)
        return BUG
    return DONE


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which batch systems and shutdowns stop a run, ends it as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bug_report() -> str:
    """What a maintainer needs, ready to paste into an issue."""
    lines = [
        "layercut met a situation that it does not know. This is a bug in layercut; please report what follows.",
        "",
        "```",
        f"layercut {__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}",
        f"command: layercut {' '.join(sys.argv[1:])}",
        traceback.format_exc().rstrip(),
        "```",
    ]
    return scrubbed("\n".join(lines))
