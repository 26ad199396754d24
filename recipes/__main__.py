"""Command line: ``python -m recipes list | run NAME | reference NAME | new NAME --like OTHER``."""

import ast
import difflib
import importlib
import json
import keyword
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import pandas as pd
import typer

if TYPE_CHECKING:
    from vi_toolkit import Comparison

# Commands import torch, pyro and vi_toolkit where they need them, so that `list` answers at once.

RECIPES = Path(__file__).resolve().parent
SHOWN_ROWS = 12  # of a comparison; its CSV file has all rows
INTERRUPTED = 130  # the exit status that shells report for a command ended by Ctrl-C

app = typer.Typer(
    help="Fit the recipes, compare them with their reference posteriors, start one of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain lines, so that error messages can be copied
)


def recipe_names() -> list[str]:
    """The recipes' names, sorted. A recipe is a folder here with a ``model.py``."""
    return sorted(path.parent.name for path in RECIPES.glob("*/model.py"))


def known_recipe(name: str) -> str:
    """`name` if there is such a recipe. Otherwise a usage error suggests the nearest name."""
    names = recipe_names()
    if name in names:
        return name
    nearest = difflib.get_close_matches(name.replace("-", "_").lower(), names, n=1, cutoff=0.4)
    hint = f"Did you mean '{nearest[0]}'?" if nearest else f"There are: {', '.join(names)}."
    raise typer.BadParameter(f"no recipe is called '{name}'. {hint}")


def new_name(name: str) -> str:
    """`name` if it is a valid package name. Otherwise a usage error says why not."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise typer.BadParameter(f"'{name}' cannot be imported: use letters, digits, underscores.")
    return name


RecipeName = Annotated[
    str, typer.Argument(metavar="NAME", callback=known_recipe, help="A recipe's name, see `list`.")
]


def fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)


def import_recipe(name: str) -> ModuleType:
    return importlib.import_module(f"recipes.{name}")


@app.command("list")
def list_recipes() -> None:
    """List every recipe with a one-line description."""
    names = recipe_names()
    width = max(map(len, names), default=0)
    for name in names:
        module = ast.parse((RECIPES / name / "__init__.py").read_text("utf-8"))
        docstring = ast.get_docstring(module) or ""
        typer.echo(f"{name:{width}}  {docstring.partition(chr(10))[0]}")


def labelled(text: str, recipe: ModuleType) -> str:
    """`text` with positions in named dimensions replaced by their labels.

    ``coefficients[2]`` becomes ``coefficients[sex]`` where ``LATENTS`` gives coefficients the
    dimension "predictors" and ``coords()`` gives that dimension's labels.
    """
    labels = recipe.coords()

    def label(match: re.Match[str]) -> str:
        site, positions = match[1], match[2].split(",")
        dims = recipe.LATENTS.get(site, ())
        if len(dims) != len(positions):  # no such site, or scalars on another, unconstrained scale
            return match[0]
        own = [
            str(labels[dim][int(position)]) if dim in labels else position
            for dim, position in zip(dims, positions, strict=True)
        ]
        return f"{site}[{', '.join(own)}]"

    return re.sub(r"(\w+)\[([\d,]+)\]", label, text)


def comparison_text(comparison: "Comparison", recipe: ModuleType) -> str:
    """The comparison for a terminal: the worst rows of its table, the verdict and the reasons."""
    table = comparison.table
    # Rank rows by their distance from what the guide's family can reach, so that the rows behind a
    # bad verdict come first. A point estimate has sds of zero, as expected.
    ratio, expected = (
        np.log(table[column].clip(lower=1e-9)) for column in ("sd ratio", "expected sd ratio")
    )
    misfit = (ratio - expected).abs().clip(lower=table["mean error"].abs())
    shown = table[misfit.rank(ascending=False, method="first") <= SHOWN_ROWS]
    # Print as many digits as the reference's sd needs for three significant ones.
    digits = (2 - np.floor(np.log10(shown["reference sd"]))).clip(lower=0).astype(int)
    columns = {}
    source = {"nuts": "MCMC"}.get(comparison.reference.kind, comparison.reference.kind)
    for heading, side in ((source, "reference"), ("VI", "VI")):
        columns[f"{heading} mean ± sd"] = [
            f"{mean:.{d}f} ± {sd:.{d}f}"
            for mean, sd, d in zip(shown[f"{side} mean"], shown[f"{side} sd"], digits, strict=True)
        ]
    columns["error / sd"] = [f"{error:+.3f}" for error in shown["mean error"]]
    for heading in ("sd ratio", "expected sd ratio"):
        columns[heading.removesuffix(" sd ratio")] = [f"{ratio:.3f}" for ratio in shown[heading]]
    columns["right"] = ["yes" if ok else "NO" for ok in shown["ok"]]
    lines = [pd.DataFrame(columns, [labelled(name, recipe) for name in shown.index]).to_string()]
    if len(shown) < len(table):
        lines.append(f"These are the {len(shown)} of {len(table)} scalars that are furthest off.")
    lines += ["", f"Verdict: {comparison.verdict}."]
    lines += [f"- {labelled(reason, recipe)}" for reason in comparison.reasons]
    return "\n".join(lines)


@app.command()
def run(
    name: RecipeName,
    output: Annotated[Path, typer.Option(help="Folder that gets a folder NAME.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Seed of every fit.")] = 0,
) -> None:
    """Fit a recipe to its real data with each of its guides; compare with the reference."""
    import vi_toolkit as vi
    from vi_toolkit.comparison import plot_comparisons

    recipe = import_recipe(name)
    model, guides, data = reference_problem(recipe)
    if not (RECIPES / name / "reference.json").exists():
        fail(f"There is no reference posterior yet. Make one: python -m recipes reference {name}")
    reference = vi.Reference.load(RECIPES / name / "reference.json")
    folder = output / name
    comparisons = {}
    for label, guide in guides.items():
        typer.echo(f"{name}, {label} guide\n")
        fit = vi.fit(model, guide, data, seed=seed)
        if fit.interrupted:  # `fit` returns what it has so far, which is not worth comparing
            typer.echo(f"Interrupted: nothing was written for the {label} guide.", err=True)
            raise typer.Exit(INTERRUPTED)
        comparisons[label] = vi.compare(fit, reference)
        typer.echo(f"{fit}\n\n{comparison_text(comparisons[label], recipe)}\n\n")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / re.sub(r"\W+", "_", label)
        fit.save(file.with_suffix(".safetensors"))
        fit.plot().savefig(file.with_suffix(".png"), dpi=150)
        comparisons[label].table.to_csv(file.with_suffix(".csv"))
    figure = plot_comparisons(comparisons)
    names = figure.axes[0].yaxis
    names.set_ticklabels([labelled(text.get_text(), recipe) for text in names.get_ticklabels()])
    figure.savefig(folder / "comparison.png", dpi=150)
    typer.echo(f"""\
In {folder}:
  comparison.png      every guide against the reference
  GUIDE.png           the ELBO and the posterior
  GUIDE.csv           the whole table
  GUIDE.safetensors   the fit itself; vi.load reads it""")


def reference_problem(recipe):
    """(model, guides, data) whose posterior a recipe's reference.json holds.

    These are the recipe's own, unless its posterior is not identified. Such a recipe exports a
    function `reference_problem`, which returns an identified part of it or a smaller problem.
    """
    if hasattr(recipe, "reference_problem"):
        return recipe.reference_problem()
    return recipe.model, recipe.GUIDES, recipe.load_data()


@app.command()
def reference(name: RecipeName) -> None:
    """Compute a recipe's reference posterior again and write its reference.json."""
    import vi_toolkit as vi

    recipe = import_recipe(name)
    try:
        if callable(getattr(recipe, "reference", None)):
            posterior = recipe.reference()  # exact, or MCMC with the recipe's own settings
        else:
            command = f"python -m recipes reference {name}"
            posterior = vi.Reference.nuts(recipe.model, recipe.load_data(), command=command)
    except vi.VIError as error:  # the message names the scalar at fault and what to try
        fail(str(error))
    path = RECIPES / name / "reference.json"
    posterior.save(path)
    typer.echo(repr(posterior))
    for key, value in posterior.made.items():
        typer.echo(f"  {key}: {value}")
    typer.echo(f"written to {path}")


def renamer(old: str, new: str, old_stem: str, new_stem: str):
    """A function that renames recipe `old` to `new` in text.

    It replaces only the recipe's own name, as in ``test_old`` and ``recipes.old`` but not in
    ``sklearn.old`` and ``bold``, and the numbered stem of its notebook.
    """
    own_name = re.compile(rf"(?<![A-Za-z0-9_])(?<!(?<!recipes)\.)(test_)?{old}(?![A-Za-z0-9_])")

    def rename(text: str) -> str:
        return own_name.sub(rf"\g<1>{new}", text.replace(old_stem, new_stem))

    return rename


def rename_notebook(value: Any, rename) -> Any:
    """`value` (parsed notebook JSON) with every string renamed, except for pictures."""
    if isinstance(value, str):
        return rename(value)
    if isinstance(value, list):
        return [rename_notebook(item, rename) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key.startswith("image/") else rename_notebook(item, rename)
            for key, item in value.items()
        }
    return value


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", callback=new_name, help="Its name.")],
    like: Annotated[str, typer.Option(callback=known_recipe, help="The recipe to start from.")],
    into: Annotated[
        Path | None, typer.Option(help="A folder of your own; default: this repository.")
    ] = None,
) -> None:
    """Copy a recipe, its notebook and its test into a working template under a new name."""
    source = RECIPES.parent
    into = into or source
    notebook = next((source / "notebooks").glob(f"*[0-9]_{like}.ipynb"), None)
    test = source / "tests" / "recipes" / f"test_{like}.py"
    if notebook is None or not test.exists():
        fail(f"'{like}' has no notebook or no test beside it: `new` needs a clone.")
    numbers = [int(path.name[:2]) for path in (into / "notebooks").glob("[0-9][0-9]_*.ipynb")]
    stem = f"{max(numbers, default=0) + 1:02d}_{name}"
    folder = into / "recipes" / name
    new_notebook = into / "notebooks" / f"{stem}.ipynb"
    new_test = into / "tests" / "recipes" / f"test_{name}.py"
    taken = [str(path) for path in (folder, new_test) if path.exists()]
    taken += [str(path) for path in (into / "notebooks").glob(f"*[0-9]_{name}.ipynb")]
    if taken:
        raise typer.BadParameter(f"there already is {' and '.join(taken)}.", param_hint="NAME")

    rename = renamer(like, name, notebook.stem, stem)
    shutil.copytree(RECIPES / like, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.rglob("*"):
        if path.suffix in {".py", ".json", ".md"}:
            path.write_text(rename(path.read_text("utf-8")), "utf-8")
    for path in (new_notebook, new_test):
        path.parent.mkdir(parents=True, exist_ok=True)
    cells = rename_notebook(json.loads(notebook.read_text("utf-8")), rename)
    new_notebook.write_text(json.dumps(cells, indent=1, ensure_ascii=False) + "\n", "utf-8")
    new_test.write_text(rename(test.read_text("utf-8")), "utf-8")
    # The test and `python -m recipes` need these files in another folder too.
    for shared in (
        "recipes/__init__.py",
        "recipes/__main__.py",
        "tests/__init__.py",
        "tests/conftest.py",
        "tests/models.py",
        "tests/support.py",
        "tests/tolerances.py",
        "tests/recipes/__init__.py",
    ):
        if not (into / shared).exists():
            shutil.copy(source / shared, into / shared)

    typer.echo(f"""\
{folder}
{new_notebook}
{new_test}
are a working copy of '{like}'. Check it: python -m pytest {new_test}

Then make it yours, in this order:
  1. {folder / "data.py"}: load_data(), coords() and simulate() for your data;
  2. {folder / "model.py"}: the model, and LATENTS, each site's plates and sizes;
  3. {folder / "guide.py"}: the guide, and why you chose this family;
  4. python -m recipes reference {name}: its reference posterior by NUTS
     (delete or rewrite the recipe's reference(), if any: it describes the old model);
  5. {folder / "__init__.py"}: the formula, the source, the example;
  6. the test, the notebook, and a row with a picture in README.md.""")


if __name__ == "__main__":
    app(prog_name="python -m recipes")
