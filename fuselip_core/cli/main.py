"""The command line: a command for each stage, and a few more. Each calls one function."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fuselip_core import config, stages
from fuselip_core.cli import data as data_cli
from fuselip_core.cli import index as index_cli
from fuselip_core.cli import serve as serve_cli
from fuselip_core.cli import vqa as vqa_cli
from fuselip_core.errors import FuselipError, log_to_stderr, run_to_exit
from fuselip_core.files import atomic_write
from fuselip_core.search import DEFAULT_MODEL
from fuselip_core.tracking import telemetry

Beside = Literal["published"]

app = typer.Typer(
    help="FuseLIP adapted to radiology: one encoder for images, texts, and images with text.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes = typer.Typer(help="The recipes of this package.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")
app.add_typer(data_cli.app, name="data")
app.add_typer(vqa_cli.app, name="vqa")
app.add_typer(index_cli.app, name="index")
app.command("serve")(serve_cli.serve)
app.command("app")(serve_cli.app)

SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", help="Settings file; default: params.yaml in this folder, unless --recipe is given."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Recipe; see `fuselip recipes list`.")]
SizeOption = Annotated[
    str | None, typer.Option("--size", help="tiny, small, base or large; default: the recipe's.", metavar="SIZE")
]
ArtifactsOption = Annotated[Path | None, typer.Option("--artifacts", help="Folder of all stages' outputs.")]


def _show_version(asked: bool) -> None:
    if asked:
        from fuselip_core.data.prepare.prepare import tool_version

        typer.echo(f"fuselip {tool_version()}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; allowed in any position.")
    ] = False,
) -> None:
    """FuseLIP adapted to radiology: one encoder for images, texts, and images with text."""


def _settings_file(given: Path | None, recipe: str | None) -> Path | None:
    found = Path("params.yaml")
    return found if given is None and recipe is None and found.is_file() else given


def _load(
    given: Path | None, overrides: list[str] | None, recipe: str | None, size: str | None, artifacts: Path | None
) -> config.Settings:
    return config.load_settings(_settings_file(given, recipe), overrides or (), recipe, artifacts, size)


def _add_stage(name: str) -> None:
    @app.command(name, help=getattr(stages, name).__doc__)
    def run(
        settings: SettingsOption = None,
        overrides: SetOption = None,
        recipe: RecipeOption = None,
        size: SizeOption = None,
        artifacts: ArtifactsOption = None,
    ) -> None:
        _run_stage(name, _load(settings, overrides, recipe, size, artifacts))


def _run_stage(name: str, values: config.Settings) -> None:
    summary = getattr(stages, name)(values)
    if os.environ.get("FUSELIP_SUMMARY") != "off":
        typer.echo(json.dumps(summary, indent=2 if sys.stdout.isatty() else None, default=str))


for _name in config.STAGES:
    if _name != "evaluate":  # which has two more options
        _add_stage(_name)


@app.command(help=f"{stages.evaluate.__doc__} With --model: compares any models.")
def evaluate(
    settings: SettingsOption = None,
    overrides: SetOption = None,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    artifacts: ArtifactsOption = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Evaluate this model instead of the run's; repeatable. A folder, a hub id, models:/NAME@ALIAS, "
            "open_clip:NAME or transformers:NAME.",
        ),
    ] = None,
    compare: Annotated[
        Beside | None, typer.Option("--compare", help="With --model: add a column of published results.")
    ] = None,
) -> None:
    values = _load(settings, overrides, recipe, size, artifacts)
    if models:
        typer.echo(stages.compare(values, models, compare is not None))
    elif compare:
        raise FuselipError("--compare needs --model; name the model to compare with published results")
    else:
        _run_stage("evaluate", values)


@app.command("settings")
def show_settings(
    settings: SettingsOption = None,
    overrides: SetOption = None,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead; DVC compares its values.")] = None,
) -> None:
    """Print every field of a run with its value, its source and its meaning."""
    path = _settings_file(settings, recipe)
    values = config.load_settings(path, overrides or (), recipe, size=size)
    if out is None:
        typer.echo(config.describe_settings(values, config.layers_of(path, overrides or (), recipe, size)))
    else:
        with atomic_write(out) as partial:
            partial.write_text(config.describe_settings(values) + "\n", encoding="utf-8")


@app.command()
def embed(
    archive: index_cli.Archive,
    out: Annotated[Path, typer.Option("--out", "-o", help="Parquet file.")] = Path("embeddings.parquet"),
    model: index_cli.ModelOption = DEFAULT_MODEL,
    kind: index_cli.KindOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 64,
) -> None:
    """Write embeddings of all pictures and texts of an archive; resumes after an interruption."""
    from fuselip_core.search.embed import embed_archive

    typer.echo(f"{out}: {embed_archive(archive, out, index_cli.load(model), batch_size, kind).sentence()}")


@app.command()
def card(
    settings: SettingsOption = None,
    overrides: SetOption = None,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    artifacts: ArtifactsOption = None,
) -> None:
    """Write the model card and the data card of an evaluated run into its folder cards/."""
    from fuselip_core.cards.model_card import write_cards

    values = _load(settings, overrides, recipe, size, artifacts)
    for path in sorted(write_cards(values).iterdir()):
        typer.echo(path)


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="Folder, models:/NAME@ALIAS, or a hub id.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a model with its processor and cards to the Hugging Face Hub."""
    from fuselip_core.cards.push import push_model

    typer.echo(push_model(model, repository, private))


@app.command()
def monitor(
    seen: Annotated[Path, typer.Argument(help="Archive, or folder of `fuselip serve --observe`.")],
    settings: SettingsOption = None,
    overrides: SetOption = None,
    artifacts: ArtifactsOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Model; default: the run's.")] = None,
    kind: index_cli.KindOption = None,
) -> None:
    """Compare an archive, or a server's inputs, with the training data; writes artifacts/monitoring/index.html."""
    from fuselip_core.monitoring.monitor import monitor as compare

    findings = compare(_load(settings, overrides, None, None, artifacts), seen, model, kind)
    for each in findings:
        typer.echo(f"{'ALARM' if each.alarm else 'ok':5}  {each.title}: {each.value:.3f} (at most {each.at_most:g})")
    alarms = [each.title for each in findings if each.alarm]
    typer.echo(f"{len(alarms)} alarms{': ' if alarms else ''}{', '.join(alarms)}")


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to create; must not exist.")] = Path("data"),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw.")] = 2,
) -> None:
    """Draw the embedded sample: phantoms in ROCOv2's published layout."""
    from fuselip_core.data.phantom.data_set import draw_data_set
    from fuselip_core.files import atomic_folder

    if out.exists():
        raise FuselipError(f"{out} exists already; remove it, or name another folder with --out")
    with atomic_folder(out) as folder:
        draw_data_set(folder, seed, workers=workers)


@app.command()
def sync(artifacts: ArtifactsOption = None) -> None:
    """Send events that MLflow and wandb missed while they could not be reached."""
    from fuselip_core.tracking.run import sync as send

    if unsent := send(artifacts or Path("artifacts")):
        raise FuselipError(f"the events of {unsent} runs are not all sent; check MLFLOW_TRACKING_URI and try again")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Train a registered model again from its recorded state and compare: reproduce models:/NAME@champion.",
)
def reproduce(context: typer.Context) -> None:
    """Runs the flows, which use DVC, in a new process, since the core must not import them."""
    os.execv(sys.executable, [sys.executable, "-m", "flows.reproduce.compare", *context.args])  # noqa: S606


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help='Search for better settings: sweep --recipe sample --search "train.learning_rate=1e-4..1e-2 log".',
)
def sweep(context: typer.Context) -> None:
    """Runs the flows, like `reproduce`."""
    os.execv(sys.executable, [sys.executable, "-m", "flows.sweep", *context.args])  # noqa: S606


@recipes.command("list")
def list_recipes() -> None:
    """List the recipes with their purpose."""
    names = config.recipe_names()
    for name in names:
        typer.echo(f"{name:{max(map(len, names))}}  {config.recipe_title(name)}")


@recipes.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Recipe to print.")],
    size: SizeOption = None,
) -> None:
    """Print every field of a recipe with its value, its source and its meaning."""
    show_settings(recipe=name, size=size)


@recipes.command("diff")
def diff_recipes(
    left: Annotated[str, typer.Argument(help="Recipe to compare.")],
    right: Annotated[str, typer.Argument(help="Recipe to compare with; may be the same one at another --to-size.")],
    size: SizeOption = None,
    to_size: Annotated[
        str | None, typer.Option("--to-size", help="Size of the second recipe; default: --size.")
    ] = None,
) -> None:
    """List the fields in which two recipes differ, with both values."""
    first = config.load_settings(recipe=left, size=size)
    second = config.load_settings(recipe=right, size=to_size or size)
    for name, values in config.differences(first, second).items():
        typer.echo(f"{name}: {' → '.join(values)}")


def main() -> None:
    """Entry point. Errors are one sentence on stderr, with exit code 1, or 2 for settings."""
    telemetry.turn_off()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    log_to_stderr(debug)
    run_to_exit(lambda: app(args=arguments, prog_name="fuselip"), debug)
