"""The command line: arguments in, one clear line or a table out. Does nothing that the API does not."""

from __future__ import annotations

import json
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from layercut import api, display, gallery
from layercut.architecture import find_stack
from layercut.errors import LayercutError, OutputError
from layercut.recipe import Recipe
from layercut.source import resolve
from layercut.version import __version__

DONE, INPUT, USAGE, BUG, INTERRUPTED = 0, 1, 2, 3, 130

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the recipe, for example steps.0.prune.layers=8."
)
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress bars on stderr.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="layercut")
def cli() -> None:
    """Cut, repeat and stack the layers of transformer checkpoints from a YAML recipe."""


@cli.command()
@click.argument("recipe", metavar="RECIPE|PLAN")
@click.option("--out", metavar="DIR", help="Output folder, instead of the recipe's.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that holds something.")
@overrides
@as_json
@quiet
def run(recipe: str, out: str | None, overwrite: bool, overrides: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Plan, write, check and evaluate, as the recipe says."""
    loaded = api.load(recipe, overrides)
    folder = api.output_of(loaded, out)
    report = api.run_recipe(loaded, out=folder, overwrite=overwrite, progress=not quiet)
    click.echo(report.to_json() if as_json else display.report_text(report, folder), nl=not as_json)


@cli.command()
@click.argument("recipe")
@click.option("-o", "--output", metavar="FILE", help="Write the plan as JSON; `layercut run FILE` does exactly what it says.")
@overrides
@as_json
@quiet
def plan(recipe: str, output: str | None, overrides: Sequence[str], as_json: bool, quiet: bool) -> None:
    """Decide everything, write no model."""
    made = api.plan_recipe(recipe, overrides=overrides, progress=not quiet)
    if output is not None:
        try:
            Path(output).write_text(made.to_json(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the plan: {error.strerror}", where=output) from None
    click.echo(made.to_json() if as_json else display.plan_text(made), nl=not as_json)
    if output is not None:
        click.echo(f"to do this: layercut run {output}", err=True)


@cli.command()
@click.argument("model")
@as_json
def inspect(model: str, as_json: bool) -> None:
    """Show layers, sizes, dtypes, and what in the config depends on the layers."""
    checkpoint = resolve(model)
    data = display.inspect_data(checkpoint, find_stack(checkpoint))
    click.echo(_dumps(data) if as_json else display.inspect_text(data))


@cli.command("eval")
@click.argument("model")
@click.option("--text", metavar="PATH", help="Held-out text (.txt, .jsonl, .csv, .parquet); the built-in one if not given.")
@click.option("--column", help="Column of the text in .jsonl, .csv and .parquet.")
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Windows of text at most.")
@click.option("--max-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window.")
@as_json
@quiet
def evaluate(model: str, text: str | None, column: str | None, samples: int, max_length: int, as_json: bool, quiet: bool) -> None:
    """Measure perplexity on held-out text."""
    from layercut.calibration import BuiltinCalibration, TextCalibration
    from layercut.perplexity import LanguageModel

    common: dict[str, Any] = {"samples": samples, "max_length": max_length}
    data = BuiltinCalibration(**common) if text is None else TextCalibration(path=text, column=column, **common)
    result = LanguageModel(resolve(model).folder).perplexity(data, progress=not quiet)
    where = f"{result.source} text, {result.windows} windows of {result.max_length}, {result.dtype}"
    line = f"perplexity {result.value:.4f} on {result.tokens} tokens ({where})"
    click.echo(_dumps(result.model_dump(mode="json")) if as_json else line)


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--no-load", is_flag=True, help="Check structure only, without transformers.")
@as_json
def verify(folder: str, no_load: bool, as_json: bool) -> None:
    """Check an output against its own report, and against transformers."""
    from layercut.verify import verify as check

    result = check(Path(folder), load=not no_load)
    if as_json:
        click.echo(_dumps(result.model_dump(mode="json")))
    else:
        for line in display.columns([("ok" if c.ok else "FAILED", c.name, c.detail) for c in result.checks], indent=""):
            click.echo(line)
    if not result.ok:
        failed = [c.name for c in result.checks if not c.ok]
        raise LayercutError(f"{len(failed)} of {len(result.checks)} checks failed: {', '.join(failed)}", where=folder)


@cli.command()
@click.argument("name", required=False)
@as_json
def new(name: str | None, as_json: bool) -> None:
    """Print a starter recipe, to save as a file of your own; without a name, the gallery."""
    if name is not None:
        found = gallery.starter(name)
        click.echo(_dumps(found._asdict()) if as_json else found.text, nl=as_json)
        return
    listed = gallery.starters()
    if as_json:
        click.echo(_dumps([{"name": one.name, "group": one.group, "summary": one.summary} for one in listed]))
        return
    for line in display.columns([(one.name, one.summary) for one in listed], indent=""):
        click.echo(line)
    click.echo("to begin with one: layercut new NAME > NAME.yaml", err=True)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    click.echo(_dumps(Recipe.schema_document()))


def _dumps(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0 done, 1 the input is at fault, 2 usage, 3 a bug, 130 interrupted."""
    command: Callable[..., Any] = cli.main
    try:
        command(args=None if argv is None else list(argv), prog_name="layercut", standalone_mode=False)
    except LayercutError as error:
        click.echo(f"error: {error}", err=True)
        return INPUT
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our stdout has gone: nothing to say, and nobody to say it to
        return INPUT
    except Exception:
        click.echo(_bug_report(), err=True)
        return BUG
    return DONE


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
    return "\n".join(lines)
