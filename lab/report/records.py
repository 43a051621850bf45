"""What a run leaves as JSON, and what a later one reads of it.

In come results; out come dictionaries of plain values, under the keys that the files have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.machine.device import versions
from lab.machine.files import read_tensors
from lab.machine.options import UserError, option_of
from lab.measure import planning, statistics
from lab.measure.familiar import Familiar, Familiarity, Usual
from lab.measure.looks import Look
from lab.measure.models import Network
from lab.measure.stress import SHARES, Outcome
from lab.report import sentences
from lab.report.measurements import changes_by_network, measurements
from lab.report.results import NetworkResults, Results, SeedResults, named_images

COMPARISON_FILE = "results/comparison.json"
FAMILIAR_FILE = "results/familiar.pth"


def plan_from_earlier(
    folder: Path,
    recipe: Mapping[str, object],
    networks: Sequence[Network],
    seeds: int,
    rules: statistics.Settings,
) -> list[str]:
    """Before a run of several seeds, what it can show if its spread is an earlier run's.

    Of one with the same recipe and at least two seeds, whose results lie in the folder; `recipe` is
    its settings by option. The first of `networks` is the one that is compared with.
    """
    sentences_of_networks = []
    try:
        earlier = json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))
        for name, value in recipe.items():
            if earlier["settings"][name] != value:
                return []
        for network in networks[1:]:
            overall = earlier["compared_with_first"][network.key]["overall"]
            deviation = float(overall["over_seeds"]["planning"]["deviation"])
            known_from = len(overall["by_seed"])
            planned = planning.plan(deviation, seeds, rules, known_from)
            sentence = sentences.say_planning(planned, seeds, rules)
            sentences_of_networks.append(
                f"If {network.title} spreads as in the run before: {sentence}"
            )
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or of one seed
        return []
    return sentences_of_networks


def earlier_looks(
    folder: Path, recipe: Mapping[str, object], networks: Sequence[Network]
) -> list[Look]:
    """How often networks of this recipe have been compared over several seeds in this folder.

    `recipe` is its settings by option. None where there are no results, or they are damaged.
    """
    try:
        earlier = json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))
        if list(earlier["networks"]) != [network.key for network in networks]:
            return []
        for name, value in recipe.items():
            if earlier["settings"][name] != value:
                return []
        looks = []
        for look in earlier["looks"]:
            looks.append(Look(tuple(look["seeds"]), float(look["level"])))
        return looks
    except (OSError, ValueError, KeyError, TypeError):
        return []


def say_what_is_replaced(folder: Path, options: Mapping[str, object]) -> list[str]:
    """What of an earlier run's results in the folder a run with these options would not give.

    Its stress tests, if this run's are fewer or smaller; its seeds, if this run has fewer.
    """
    try:
        earlier = json.loads((folder / COMPARISON_FILE).read_text(encoding="utf-8"))
        fewer = []
        for name in options:
            before = earlier["settings"].get(name)
            if is_less(name, before, options[name]):
                shown = " ".join(before) if isinstance(before, list) else before
                fewer.append(f"{option_of(name)} {shown}")
        minutes = sum(earlier["seconds"].values()) / 60
        command = earlier["command"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged
        return []
    if not fewer:
        return []
    return [
        f"The results in {folder}/ are of {' and '.join(fewer)} ({command}; {minutes:.0f} min): "
        "this run replaces them by less. To keep them, choose another --output-dir"
    ]


def is_less(name: str, before: Any, now: Any) -> bool:
    """Whether an option's value now asks for less than one before."""
    if name == "stress":
        levels = list(SHARES)
        return levels.index(now) < levels.index(before)
    if name == "networks":
        return before is not None and not set(before) <= set(now)
    counts = ("seeds", "stress_images", "attack_images", "curve_images", "foreign_images")
    return name in counts and None not in (before, now) and now < before


def read_familiar(folder: Path, cure: str) -> tuple[Path, tuple[str, ...], Familiarity]:
    """The file in a folder of results, the classes' names, and what the networks know.

    UserError, with the cure, where there is none or it is damaged.
    """
    path = folder / FAMILIAR_FILE
    if not path.exists() and path.with_suffix(".json").exists():
        raise UserError(f"{folder}/ holds the results of an earlier version: {cure}")
    try:
        content = read_tensors(path)
        classes = tuple(content.pop("classes"))
        networks = {}
        for key, values in content.pop("networks").items():
            stages = tuple(Usual(**stage) for stage in values.pop("stages"))
            networks[key] = Familiar(stages=stages, **values)
        return path, classes, Familiarity(networks=networks, **content)
    except FileNotFoundError as error:
        raise UserError(f"{folder}/ holds no results of trained networks: {cure}") from error
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {cure}") from error


def by_class_name(classes: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Values in the order of the classes, under the classes' names."""
    return dict(zip(classes, values, strict=True))


def comparison_record(results: Results) -> dict[str, Any]:
    """Everything but curves and matrices of the stress tests, as comparison.json holds it."""
    setup = results.setup
    stress = results.stress
    networks = {}
    for of_network in results.networks:
        networks[of_network.network.key] = network_record(of_network, results.classes)
    compared = {}
    verdicts = {}
    for compared_network, verdict in zip(
        results.comparisons, sentences.say_verdicts(results), strict=True
    ):
        key = compared_network.network.key
        by_class = [dataclasses.asdict(group) for group in compared_network.by_class]
        compared[key] = {
            "overall": dataclasses.asdict(compared_network.overall),
            "by_class": by_class_name(results.classes, by_class),
        }
        verdicts[key] = verdict
    return {
        "dataset": results.dataset,
        "command": setup.command,
        "settings": setup.options,
        "device": results.hardware.description,
        "precision": results.hardware.precision,
        "precision_reason": results.hardware.reason,
        "versions": versions(),
        "classes": results.classes,
        "classes_count": len(results.classes),
        "explained_images": [name for name, _ in named_images(results)],
        "images": dataclasses.asdict(results.images),
        "networks": networks,
        "compared_with_first": compared,
        "verdicts": verdicts,
        "retest": {**as_record(results.retest), "said": sentences.say_retest(results)},
        "failures": failures_record(results),
        "stress": measured_means(stress),
        "stress_changes": changes_record(stress),
        "corruptions": corruptions_record(stress, setup.rules.margin),
        "foreign": foreign_record(stress),
        "masking": sentences.say_masking(stress) if stress is not None else "",
        "temperatures": sentences.say_temperatures(stress) if stress is not None else "",
        "gates": sentences.say_gates(stress) if stress is not None else "",
        "conclusion": sentences.say_conclusion(results),
        "looks": [dataclasses.asdict(look) for look in results.looks],
        "seconds": results.seconds,
        "failed": results.failed,
    }


def network_record(of_network: NetworkResults, classes: Sequence[str]) -> dict[str, Any]:
    """A network's costs, mean accuracy with intervals, and every seed's run."""
    by_class = by_class_name(classes, of_network.accuracy.by_class)
    return {
        "title": of_network.network.title,
        "about": of_network.network.about,
        "description": of_network.network.description,
        "citation": of_network.network.citation,
        "layers": {
            layer.name: {"parameters": layer.parameters, "multiply_adds": layer.multiply_adds}
            for layer in of_network.layers
        },
        "parameters": of_network.parameters(),
        "multiply_adds": of_network.multiply_adds(),
        "accuracy": {
            "overall": dataclasses.asdict(of_network.accuracy.overall),
            "by_class": {name: dataclasses.asdict(value) for name, value in by_class.items()},
        },
        "runs": [seed_record(of_seed, classes) for of_seed in of_network.runs],
    }


def seed_record(of_seed: SeedResults, classes: Sequence[str]) -> dict[str, Any]:
    """What one seed gave, its accuracy by class under the classes' names."""
    by_class = by_class_name(classes, of_seed.class_accuracy.tolist())
    return {**dataclasses.asdict(of_seed), "class_accuracy": by_class}


def corruptions_record(stress: Outcome | None, margin: float) -> dict[str, Any]:
    """Which corruptions were tried, and where the corrupted images come from."""
    if stress is None:
        return {}
    names = list(stress.corrupted)
    return {
        "count": len(names),
        "extra_count": len(names) - len(stress.benchmark_corruptions()),
        "mean_is_over": sentences.mean_is_over(stress),
        "reference": sentences.corruption_reference(stress),
        "verdicts": sentences.say_corruption(stress, margin),
        "changes": sentences.say_changes(stress),
        "changes_in_short": sentences.say_changes_in_short(stress),
        "source": sentences.corruption_source(stress),
        "names": names,
    }


def failures_record(results: Results) -> dict[str, Any]:
    """The dossier without its images: counts, associations, suspects, and what it says."""
    failures = results.failures
    if failures is None:
        return {}
    suspects = []
    for suspect in failures.labels.suspects:
        suspects.append({
            "index": suspect.index,
            "label": results.classes[suspect.label],
            "called": results.classes[suspect.called],
            "probability": suspect.probability,
            "people_for_label": suspect.people_for_label,
            "people_for_called": suspect.people_for_called,
        })
    transition_means = {}
    for one in failures.transitions:
        transition_means[one.network.key] = {
            way.name.lower(): float(counts.mean()) for way, counts in one.counts.items()
        }
    associations: dict[str, Any] = {}
    for association in failures.associations:
        fields = dataclasses.asdict(association)
        del fields["network"]
        del fields["attribute"]
        of_network = associations.setdefault(association.network.key, {})
        of_network[association.attribute] = fields
    said = sentences.say_failures(results, failures)
    return {
        "transitions": transition_means,
        "associations": associations,
        "suspect_labels": suspects,
        "suspect_count": len(suspects),
        "rejected_by_people": as_record(failures.labels.rejected),
        "people": as_record(failures.people),
        "said": dataclasses.asdict(said),
    }


def as_record(found: Any) -> dict[str, Any]:
    """A dataclass's fields; none where there is none."""
    return {} if found is None else dataclasses.asdict(found)


def foreign_record(stress: Outcome | None) -> dict[str, str]:
    """What kinds of images the networks had to tell from the test images."""
    if stress is None:
        return {}
    return {"names": ", ".join(stress.networks[0].doubt.foreign)}


def measured_means(stress: Outcome | None) -> dict[str, dict[str, float]]:
    """The mean of each measurement over seeds, and its interval, by network and metric."""
    by_network: dict[str, dict[str, float]] = {}
    if stress is None:
        return by_network
    for outcome in stress.networks:
        means: dict[str, float] = {}
        for measurement in measurements(outcome):
            key = measurement.metric.key
            interval = measurement.estimate.interval
            means[key] = interval.value
            means[f"{key}_low"] = interval.low
            means[f"{key}_high"] = interval.high
        by_network[outcome.network.key] = means
    return by_network


def changes_record(stress: Outcome | None) -> dict[str, dict[str, Any]]:
    """Each measurement's change from the first network, by network and metric."""
    record: dict[str, dict[str, Any]] = {}
    if stress is None:
        return record
    for network, changes in changes_by_network(stress).items():
        record[network.key] = {}
        for key, change in changes.items():
            fields = dataclasses.asdict(change.interval)
            record[network.key][key] = {**fields, "p": change.p, "p_holm": change.p_holm}
    return record


def stress_record(stress: Outcome) -> dict[str, Any]:
    """Every number of the stress tests, by network: the fields of `NetworkOutcome` as they are."""
    record = {}
    for of_network in stress.networks:
        fields = without_draws(dataclasses.asdict(of_network))
        del fields["network"]
        record[of_network.network.key] = fields
    return record


ESTIMATES_OWN = ("drawn", "least_deviation", "least_error", "between")


def without_draws(value: Any) -> Any:
    """Nested fields, of estimates their values by seed and their interval alone."""
    if isinstance(value, dict):
        left_out = ESTIMATES_OWN if "drawn" in value else ()
        return {name: without_draws(inner) for name, inner in value.items() if name not in left_out}
    if isinstance(value, list | tuple):
        return [without_draws(inner) for inner in value]
    return value
