"""Guiding the denoiser of one run by the classifier of another: what they must have in common."""

from __future__ import annotations

import json

from undiffuse.core.errors import ArgumentError, RunError
from undiffuse.recipes.run import USES, Run
from undiffuse.recipes.schema import Settings


def guided_settings(run: Run, guide: Run) -> Settings:
    """The settings of the run of a denoiser, with the classes that the run of a classifier tells apart.

    Raises:
        RunError: a run of another kind. ArgumentError: another path, shape or other classes, or a denoiser that was
            never trained without its classes.
    """
    _check_kinds(run, guide)
    ours, theirs = run.facts, guide.facts
    path, other = run.recipe.path(), guide.recipe.path()
    if path != other:
        wanted = json.dumps(run.recipe.settings.path)
        raise ArgumentError(
            f"the classifier {guide.folder} was trained on the path {other}, and {run.folder} on {path}: expected the "
            f"same. Train one on it: undiffuse train {guide.recipe.name} 'path={wanted}'; or, in Python, move the "
            "denoiser with ud.on_path"
        )
    if ours.shape != theirs.shape:
        raise ArgumentError(
            f"the classifier {guide.folder} was trained on data of shape {theirs.shape}, and {run.folder} on "
            f"{ours.shape}: expected the same"
        )
    labelled = ours.num_classes is not None or ours.cond_dim is not None
    if labelled and run.recipe.train_config().cond_dropout == 0:
        raise ArgumentError(
            f"{run.folder} was trained with classes and never without: --label chooses one without a classifier. What "
            "a classifier guides is trained with model.conditional=false, or with training.cond_dropout=0.1"
        )
    classes = [(facts.num_classes, facts.class_names) for facts in (ours, theirs)]
    if ours.num_classes is not None and classes[0] != classes[1]:
        raise ArgumentError(
            f"the classifier {guide.folder} tells {classes[1][0]} classes apart, {classes[1][1]}, and {run.folder} was "
            f"trained on {classes[0][0]}, {classes[0][1]}: expected the same"
        )
    told = {"num_classes": theirs.num_classes, "class_names": theirs.class_names}
    return run.recipe.settings.model_copy(update={"facts": ours.model_copy(update=told)})


def _check_kinds(run: Run, guide: Run) -> None:
    """Refuse anything but a denoiser and a classifier."""
    if run.recipe.kind != "denoiser":
        raise RunError(
            f"{run.folder} trained {USES[run.recipe.kind][0]}: a classifier guides the samples of a denoiser; give a "
            "run of one, such as of: undiffuse train score-sde-digits model.conditional=false"
        )
    if guide.recipe.kind != "classifier":
        wanted = json.dumps(run.recipe.settings.path)
        raise RunError(
            f"{guide.folder} trained {USES[guide.recipe.kind][0]}: expected the run of a classifier of noisy data. "
            f"Train one on the data and the path of {run.folder}: undiffuse train RECIPE 'path={wanted}', where RECIPE "
            "is classifier-digits, classifier-mnist or one of your own with model.kind classifier"
        )


def other_data(run: Run, guide: Run) -> str | None:
    """A note where the two were trained on unlike data of one shape, which nothing else would show."""
    ours, theirs = run.facts, guide.facts
    if ours.fingerprint == theirs.fingerprint:
        return None
    return f"{guide.folder} was trained on {theirs.data}, {run.folder} on {ours.data}: other data"
